"""Computes what `hf-gem list` and `hf-gem show` print about members of a family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..family.formulas import forward, slope
from ..family.names import GemSpec, grammar, parse
from ..family.table import FAMILIES
from ..init import gain

ORDERS = (1, 2, 3)  # the paper's values of N
_AT = (-4.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # in units of the half point
_SMOOTH = {"egem", "segem"}  # families proven to be C^(2n)
_NUM_POINTS = 2**17  # on each side of 0; the error of extrema is then about 3e-6 for n = 32


def family_row(name: str) -> dict[str, Any]:
    """Returns a family's names and defaults, and its gain and largest slope for each n."""
    family = FAMILIES[name]
    members = [GemSpec(name, n) for n in ORDERS]
    return {
        "family": name,
        "title": family.title,
        "formula": family.formula,
        "names": grammar(family),
        "default_n": members[0].n,
        "default_eps": family.default_eps,
        "eps_is_fixed": family.fixed_eps is not None,
        "gain": {str(spec.n): gain(spec.name) for spec in members},
        "largest_slope": {str(spec.n): _extremes(spec)["largest_slope"][0] for spec in members},
    }


def describe(name: str) -> dict[str, Any]:
    """Returns what `hf-gem show` prints about a member.

    Args:
        name: Name of the member.

    Raises:
        ValueError: The name is malformed.
    """
    spec = parse(name)
    fixed = replace(spec, learnable=False)
    x = half_point(spec) * torch.tensor(_AT, dtype=torch.float64, device="cpu")
    values, slopes = functions(fixed)
    return {
        "name": spec.name,
        "family": spec.family,
        "title": spec.definition.title,
        "formula": spec.definition.formula,
        "n": spec.n,
        "eps": spec.eps,
        "learnable": spec.learnable,
        "half_point": half_point(spec),
        "continuous_derivatives": 2 * spec.n if spec.definition.kernels in _SMOOTH else None,
        "gain": gain(fixed.name),
        "gain_centered": gain(fixed.name, centered=True),
        **_extremes(fixed),
        "values": [list(row) for row in zip(x.tolist(), values(x).tolist(), slopes(x).tolist(), strict=True)],
    }


def half_point(spec: GemSpec) -> float:
    """Returns the x at which the gate is half open."""
    return float(spec.eps ** (1 / (2 * spec.n)))


def functions(spec: GemSpec) -> tuple[Any, Any]:
    """Returns the function and its slope, for float64 tensors."""
    family = spec.definition
    return (lambda x: forward(family, spec.n, spec.eps, x)), (lambda x: slope(family, spec.n, spec.eps, x))


def _extremes(spec: GemSpec) -> dict[str, tuple[float, float | None]]:
    """Finds extreme slopes, lowest value and largest distance from ReLU, each with its x, or None for several x."""
    side = half_point(spec) * torch.logspace(-3, 3, _NUM_POINTS, dtype=torch.float64, device="cpu")
    x = torch.cat((-side.flip(0), side))
    value, derivative = (function(x) for function in functions(spec))

    def largest(what: Tensor, sign: int = 1) -> tuple[float, float | None]:
        place = int((sign * what).argmax())
        equal = x[what == what[place]]  # neighbours may round to the same value
        unique = float(equal.max() - equal.min()) < 0.01 * abs(float(x[place]))
        return float(what[place]), float(x[place]) if unique else None

    return {
        "largest_slope": largest(derivative),
        "smallest_slope": largest(derivative, -1),
        "lowest_value": largest(value, -1),
        "distance_from_relu": largest((value - F.relu(x)).abs()),
    }
