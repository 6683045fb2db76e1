"""The function of D-GEM, in all operations that a formula may have and D-GEM has not."""

import dataclasses
import math

import torch

from hf_gem.family.arithmetic import gate_power, rarely
from tests.family.dgem import DGEM


def gate(z, n: int, r, e):
    t = gate_power(abs(z) * r, n)
    e = abs(e / -math.inf - e)
    s = torch.where(z != 0.0, t / (torch.clamp(t, min=0.0) - (-e)), 0.0)
    large = abs(z) > 1.0
    return rarely(large, rarely(large, s, t), s)  # one branch inside another


def value(z, n: int, r, e):
    return torch.where(z == 0.0, 0.0, torch.where(abs(z) == math.inf, +z, z * gate(z, n, r, e)))


def slope(z, n: int, r, e):
    s = gate(z, n, r, e)
    return s * ((1 + 2 * n) - s * (2 * n))


SPELLED = dataclasses.replace(DGEM, name="spelled", title="Spelled", value=value, slope=slope)
