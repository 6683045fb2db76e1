"""SE-GEM: with t = x^(2n) and the gate s = t / (t + eps),

    segem(x) = x            for x >= 0          slope 1
               x (1 - s)    for x < 0           slope (1 - s) (1 - 2n s)

It equals x + egem(-x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arithmetic import Real, at_most, beyond, bound, excess, power, rarely, remainder
from .egem import eps_slope as egem_eps_slope
from .table import Family, add


def exact(x: Any, n: int, eps: Any) -> Any:
    return x * eps / (x ** (2 * n) + eps) if x < 0 else x


def value(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    m = torch.abs(z)
    c = 1.0 / (_power(m * r, n) + e) * e
    return torch.where(z < 0, -remainder(m, beyond(m, n, r), n, c), z)


def slope(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    m = torch.abs(z)
    t = _power(m * r, n)
    inverse = 1.0 / (t + e)
    c = inverse * e
    w = beyond(m, n, r)
    factor = rarely(w >= 1.0, c * power(excess(w), 2 * n), c)
    return torch.where(z < 0, factor * (1.0 - inverse * t * (2 * n)), 1.0)


def _power(v: Tensor, n: int) -> Tensor:
    """`gate_power` of a v >= 0."""
    return power(at_most(v, bound(n, v.dtype)), 2 * n)


def eps_slope(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    """x s (1 - s) for x < 0, else 0."""
    return egem_eps_slope(-z, n, r, e)


SEGEM = add(
    Family(
        name="segem",
        title="SE-GEM",
        formula="x for x >= 0, x eps / (t + eps) with t = x^(2n) for x < 0",
        exact=exact,
        value=value,
        slope=slope,
        eps_slope=eps_slope,
    )
)
