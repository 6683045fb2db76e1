"""The formulas of a family in plain torch, for tensors of any shape and floating-point dtype.

float16 and bfloat16 are computed in float32 and rounded once at the end. float32 and float64 are computed in their own
dtype. eps is a positive number, or a tensor that broadcasts against x.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .arithmetic import digits, saturated, scale, scale_tensor, working
from .table import Family


def forward(family: Family, n: int, eps: float | Tensor, x: Tensor) -> Tensor:
    """f(x), in the dtype of x."""
    z = working(x)
    return family.value(z, n, *_scale(eps, n, z)).to(x.dtype)


def slope(family: Family, n: int, eps: float | Tensor, x: Tensor) -> Tensor:
    """df/dx, in the working dtype of x."""
    z = working(x)
    return family.slope(z, n, *_scale(eps, n, z))


def slope_at(family: Family, n: int, eps: float | Tensor, y: Tensor) -> Tensor:
    """df/dx at the x where f(x) = y, in the working dtype of y."""
    assert family.slope_at is not None
    z = working(y)
    return family.slope_at(z, n, *_scale(eps, n, z), digits(y.dtype))


def inverse(family: Family, n: int, eps: float | Tensor, y: Tensor) -> Tensor:
    """Returns the x where f(x) = y, in the working dtype of y."""
    assert family.inverse is not None
    z = working(y)
    return family.inverse(z, n, *_scale(eps, n, z))


def eps_slope(family: Family, n: int, eps: Tensor, x: Tensor) -> Tensor:
    """df/d(eps), in the working dtype of x, and 0 where eps is outside LEARNABLE_RANGE."""
    assert family.eps_slope is not None
    z = working(x)
    eps = eps.to(z.dtype)
    held = saturated(eps)
    return family.eps_slope(z, n, *scale_tensor(eps, n)) / held * (eps == held)


def _scale(eps: float | Tensor, n: int, z: Tensor) -> tuple[Any, Any]:
    return scale_tensor(eps.to(z.dtype), n) if isinstance(eps, Tensor) else scale(eps, n)
