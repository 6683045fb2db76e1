"""Checks a family: compares its formulas with its exact definition, evaluated on fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch

from ..files import shown
from . import formulas
from .table import Family

_POINTS = [Fraction(k, 8) for k in (-4000, -24, -9, -8, -3, -1, 0, 1, 3, 8, 9, 24, 4000)]
_MEMBERS = [(1, 1.0), (2, 1.0), (1, 2.0**-10), (3, 4.0)]
_FAR = [Fraction(-(2**100)), Fraction(2**100)]  # where powers overflow in float32
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # formulas are some twenty roundings from the exact value


class Dual:
    """A dual number a + b d with d^2 = 0: arithmetic on dual numbers differentiates `exact` exactly."""

    def __init__(self, value: Any, slope: Any = 0) -> None:
        self.value, self.slope = value, slope

    def __add__(self, other: Any) -> Dual:
        other = _dual(other)
        return Dual(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other: Any) -> Dual:
        other = _dual(other)
        return Dual(self.value - other.value, self.slope - other.slope)

    def __rsub__(self, other: Any) -> Dual:
        return _dual(other) - self

    def __mul__(self, other: Any) -> Dual:
        other = _dual(other)
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def __truediv__(self, other: Any) -> Dual:
        other = _dual(other)
        ratio = self.value / other.value
        return Dual(ratio, (self.slope - ratio * other.slope) / other.value)

    def __rtruediv__(self, other: Any) -> Dual:
        return _dual(other) / self

    def __pow__(self, k: int) -> Dual:
        return Dual(self.value**k, k * self.value ** (k - 1) * self.slope) if k else Dual(Fraction(1))

    def __neg__(self) -> Dual:
        return Dual(-self.value, -self.slope)

    def __abs__(self) -> Dual:
        return -self if self.value < 0 else self

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < _dual(other).value)

    def __le__(self, other: Any) -> bool:
        return bool(self.value <= _dual(other).value)

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > _dual(other).value)

    def __ge__(self, other: Any) -> bool:
        return bool(self.value >= _dual(other).value)

    __radd__, __rmul__ = __add__, __mul__


def _dual(x: Any) -> Dual:
    return x if isinstance(x, Dual) else Dual(x)


def exact_slope(family: Family, x: Fraction, n: int, eps: Fraction) -> Fraction:
    """Returns the derivative of `exact` with respect to x."""
    slope = _dual(family.exact(Dual(x, Fraction(1)), n, eps)).slope
    return Fraction(slope)


def exact_eps_slope(family: Family, x: Fraction, n: int, eps: Fraction) -> Fraction:
    """Returns the derivative of `exact` with respect to log(eps)."""
    slope = _dual(family.exact(x, n, Dual(eps, eps))).slope
    return Fraction(slope)


@torch.inference_mode(False)  # which also turns gradients on
def check(family: Family) -> None:
    """Compares the formulas of a family with its exact definition: in float64, and in float32 far from 0.

    eps is a number, and if it is free also a tensor, as a learnable one is.

    Raises:
        ValueError: They disagree. The message names the formula and gives x, n and eps.
    """
    for n, eps in _members(family):
        value, slopes = _check_formulas(family, n, eps, _POINTS, torch.float64)
        _check_formulas(family, n, eps, _FAR, torch.float32)
        _check_infinity(family, n, eps)
        if family.slope_at is not None and family.invertible(n, eps, torch.float64):
            rises = [k for k, s in enumerate(slopes) if s != 0]
            at = formulas.slope_at(family, n, eps, value[rises])
            points = [_POINTS[k] for k in rises]
            _compare(family, "slope_at", "the derivative of exact", n, eps, points, at, [slopes[k] for k in rises])
            x_again = formulas.inverse(family, n, eps, value[rises])
            _compare(family, "inverse", "x", n, eps, points, x_again, points)


def _check_formulas(
    family: Family, n: int, eps: float | torch.Tensor, points: list[Fraction], dtype: torch.dtype
) -> tuple[torch.Tensor, list[Fraction]]:
    """Checks value and slope. Returns the values and the exact slopes."""
    x = torch.tensor([float(point) for point in points], dtype=dtype, device="cpu")
    value = formulas.forward(family, n, eps, x)
    slope = formulas.slope(family, n, eps, x)
    number = Fraction(float(eps))
    slopes = [exact_slope(family, point, n, number) for point in points]
    _compare(family, "value", "exact", n, eps, points, value, [family.exact(point, n, number) for point in points])
    _compare(family, "slope", "the derivative of exact", n, eps, points, slope, slopes)
    if isinstance(eps, torch.Tensor):
        _check_eps_slopes(family, n, eps, points, x)
    return value, slopes


def _check_eps_slopes(family: Family, n: int, eps: torch.Tensor, points: list[Fraction], x: torch.Tensor) -> None:
    """Checks the derivatives with respect to log(eps): eps_slope, and what autograd makes of value."""
    by = "with respect to log(eps)"
    exact = [exact_eps_slope(family, point, n, Fraction(eps.item())) for point in points]
    if family.eps_slope is not None:
        found = formulas.eps_slope(family, n, eps, x) * eps
        _compare(family, "eps_slope", f"the derivative of exact {by}", n, eps, points, found, exact)
    if x.dtype == torch.float64:  # in float32, the gate may be a constant far from 0
        log_eps = eps.log().requires_grad_()
        value = formulas.forward(family, n, log_eps.exp(), x) + 0.0 * log_eps  # even if it ignores eps
        found = torch.stack([torch.autograd.grad(y, log_eps, retain_graph=True)[0] for y in value])
        _compare(family, f"the derivative {by} of value", f"the derivative of exact {by}", n, eps, points, found, exact)


def _check_infinity(family: Family, n: int, eps: float | torch.Tensor) -> None:
    x = torch.tensor([-math.inf, math.inf], device="cpu", dtype=torch.float32)
    for what, formula in (("value", formulas.forward), ("slope", formulas.slope)):
        for point, got in zip(x.tolist(), formula(family, n, eps, x).tolist(), strict=True):
            if math.isnan(got):
                raise ValueError(
                    f"{what} of family {shown(family.name)} is nan at x = {point}, n = {n}, {_named(eps)} in float32. "
                    "It must be a number or infinity. Clamp x or its powers, as in hf_gem.family.arithmetic."
                )


def _members(family: Family) -> Iterator[tuple[int, float | torch.Tensor]]:
    for n, eps in _MEMBERS:
        if family.fixed_eps is not None:
            yield n, family.fixed_eps
        else:
            yield n, eps
            yield n, torch.tensor(eps, dtype=torch.float64, device="cpu")


def _compare(
    family: Family,
    what: str,
    of: str,
    n: int,
    eps: float | torch.Tensor,
    points: list[Fraction],
    found: torch.Tensor,
    wanted: list[Fraction],
) -> None:
    if found.shape != (len(points),):
        raise ValueError(
            f"{what} of family {shown(family.name)} returned shape {tuple(found.shape)} for an input of shape "
            f"{(len(points),)}. It must be elementwise. Use only elementwise operations in it."
        )
    rights = torch.tensor([float(right) for right in wanted], dtype=found.dtype, device="cpu").tolist()
    for x, got, right in zip(points, found.tolist(), rights, strict=True):
        if got != right and not abs(got - right) <= _TOLERANCE[found.dtype] * max(abs(right), 1e-6):
            raise ValueError(
                f"{what} of family {shown(family.name)} is {got:.12g} at x = {float(x):g}, n = {n}, {_named(eps)} in "
                f"{str(found.dtype).removeprefix('torch.')}. It must equal {of}, which is {right:.12g}. Fix whichever "
                "is wrong."
            )


def _named(eps: float | torch.Tensor) -> str:
    return f"eps = {float(eps):g}" + " as a tensor" * isinstance(eps, torch.Tensor)
