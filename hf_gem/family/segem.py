"""SE-GEM. With t = x^(2n) and the gate s = t / (t + eps):

    segem(x) = x            for x >= 0          slope 1
               x (1 - s)    for x < 0           slope (1 - s) (1 - 2n s)

SE-GEM equals x + egem(-x).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arithmetic import Real, at_bound, complement, power, rarely, remainder
from .egem import eps_slope as egem_eps_slope
from .table import Family, add


def exact(x: Any, n: int, eps: Any) -> Any:
    return x * eps / (x ** (2 * n) + eps) if x < 0 else x


def value(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    return torch.where(z < 0, -remainder(-z, n, r, e), z)


def slope(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    t, far, q = complement(-z, n, r, e)
    c = rarely(far, power(q, 2 * n) * at_bound(n, z.dtype), q) * e
    s = torch.where(far, 1.0, q * t)
    return torch.where(z < 0, c * (1.0 - s * (2 * n)), 1.0)


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
