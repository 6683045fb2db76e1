"""Checks a family: compares its formulas with its exact definition, evaluated on fractions."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch

from ..files import shown
from . import formulas
from .table import Family

_POINTS = [Fraction(k, 8) for k in (-4000, -24, -9, -8, -3, -1, 0, 1, 3, 8, 9, 24, 4000)]
_MEMBERS = [(1, 1.0), (2, 1.0), (1, 2.0**-10), (3, 4.0)]
_TOLERANCE = 1e-9  # for float64 formulas, which are some twenty roundings away from the exact value


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


def check(family: Family) -> None:
    """Compares the float64 formulas of a family with its exact definition.

    Raises:
        ValueError: They disagree. The message names the formula and gives x, n and eps.
    """
    for n, eps in _members(family):
        x = torch.tensor([float(point) for point in _POINTS], dtype=torch.float64, device="cpu")
        value = formulas.forward(family, n, eps, x)
        slope = formulas.slope(family, n, eps, x)
        exact = [family.exact(point, n, Fraction(eps)) for point in _POINTS]
        slopes = [exact_slope(family, point, n, Fraction(eps)) for point in _POINTS]
        _compare(family, "value", "exact", n, eps, _POINTS, value, exact)
        _compare(family, "slope", "the derivative of exact", n, eps, _POINTS, slope, slopes)
        if family.eps_slope is not None and family.fixed_eps is None:
            eps_slope = formulas.eps_slope(family, n, torch.tensor(eps, dtype=x.dtype, device="cpu"), x) * eps
            eps_slopes = [exact_eps_slope(family, point, n, Fraction(eps)) for point in _POINTS]
            of = "the derivative of exact with respect to log(eps)"
            _compare(family, "eps_slope", of, n, eps, _POINTS, eps_slope, eps_slopes)
        if family.slope_at is not None and family.invertible(n, eps, torch.float64):
            rises = [k for k, s in enumerate(slopes) if s != 0]
            at = formulas.slope_at(family, n, eps, value[rises])
            points = [_POINTS[k] for k in rises]
            _compare(family, "slope_at", "the derivative of exact", n, eps, points, at, [slopes[k] for k in rises])
            x_again = formulas.inverse(family, n, eps, value[rises])
            _compare(family, "inverse", "x", n, eps, points, x_again, points)


def _members(family: Family) -> Iterator[tuple[int, float]]:
    for n, eps in _MEMBERS:
        yield n, eps if family.fixed_eps is None else family.fixed_eps


def _compare(
    family: Family,
    what: str,
    of: str,
    n: int,
    eps: float,
    points: list[Fraction],
    found: torch.Tensor,
    wanted: list[Fraction],
) -> None:
    if found.shape != (len(points),):
        raise ValueError(
            f"{what} of family {shown(family.name)} returned shape {tuple(found.shape)} for an input of shape "
            f"{(len(points),)}. It must be elementwise. Use only elementwise operations in it."
        )
    for x, got, right in zip(points, found.tolist(), wanted, strict=True):
        if not abs(got - float(right)) <= _TOLERANCE * max(abs(float(right)), 1e-6):
            raise ValueError(
                f"{what} of family {shown(family.name)} is {got:.12g} at x = {float(x):g}, n = {n}, eps = {eps:g}. It "
                f"must equal {of}, which is {float(right):.12g}. Fix whichever is wrong."
            )
