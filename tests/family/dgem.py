"""D-GEM, a family that is not ours: a smooth soft threshold, `x t / (t + eps)` with `t = x^(2n)` on both sides of 0."""

import torch

from hf_gem.family.arithmetic import gate_power
from hf_gem.family.table import Family


def exact(x, n, eps):
    t = x ** (2 * n)
    return x * t / (t + eps)


def value(z, n: int, r, e):
    t = gate_power(torch.abs(z) * r, n)
    return z * (t / (t + e))


def slope(z, n: int, r, e):
    t = gate_power(torch.abs(z) * r, n)
    s = t / (t + e)
    return s * ((1 + 2 * n) - s * (2 * n))


DGEM = Family("dgem", "D-GEM", "x t / (t + eps) with t = x^(2n)", exact, value, slope)
