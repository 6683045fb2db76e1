"""GEM and E-GEM. With t = x^(2n) and the gate s = t / (t + eps):

    egem(x) = x s   for x > 0, else 0          slope s (1 + 2n (1 - s)) for x > 0, else 0

GEM is E-GEM with eps = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arithmetic import Real, bound, gate_power, positive, power, remainder, rough_root
from .table import Family, add

MAX_INVERTIBLE_N = 4  # up to this n, the iteration of _preimage reaches the accuracy of every dtype


def exact(x: Any, n: int, eps: Any) -> Any:
    if not x > 0:
        return x * 0
    t = x ** (2 * n)
    return x * t / (t + eps)


def value(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    t = gate_power(z * r, n)
    if isinstance(e, Tensor):
        # Past the bound, x s rounds to x, but its derivative in eps does not round to zero.
        far = z - remainder(z, n, r, e)
        return torch.where(z * r > bound(n, z.dtype), far, positive(z) * (t / (t + e)))
    return z.clamp(min=0.0) * (t / (t + e))


def slope(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    t = gate_power(z * r, n)
    s = t / (t + e)
    return s * ((1 + 2 * n) - s * (2 * n))


def eps_slope(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    """-x s (1 - s) for x > 0, else 0."""
    t = gate_power(z * r, n)
    return -(remainder(z, n, r, e) * (t / (t + e)))


def slope_at(y: Tensor, n: int, r: Real, e: Real, digits: int) -> Tensor:
    """Returns the slope at the x whose output is y, and 0 for y <= 0. Requires n <= MAX_INVERTIBLE_N.

    E-GEM is strictly increasing for x > 0 and d log x / d log y <= 1, so a rounded y determines the slope as accurately
    as a rounded x. For y below 2^-40 eps^(1/2n), the slope comes out too small, by less than 2^-25.
    """
    w, a, b = _preimage(y, n, r, e, digits)
    s = w * b / a
    return s * ((1 + 2 * n) - s * (2 * n))


def inverse(y: Tensor, n: int, r: Real, e: Real) -> Tensor:
    """Returns the x > 0 whose output is y, and 0 for y <= 0. Requires n <= MAX_INVERTIBLE_N."""
    w, a, b = _preimage(y, n, r, e, 53 if y.dtype == torch.float64 else 24)
    # y is x^(2n+1) / eps far below the scale of the gate, and x far above it.
    k = 1 / (2 * n + 1)
    near_zero = y.clamp(min=0.0).pow(k) * (e**k * r ** (k - 1))
    x = torch.where(w < _smallest(w.dtype), near_zero, a / b / r)
    return torch.where(w < bound(n, w.dtype), x, y)


def invertible(n: int, eps: float | Tensor, dtype: torch.dtype) -> bool:
    """Returns whether the slope can be recovered from the output to within a rounding of `dtype`.

    This requires n <= MAX_INVERTIBLE_N and outputs that do not underflow too early. An output with an error of half the
    smallest subnormal, h, gives a slope with an error of 2n h / x. The error is largest at y = h, where
    x = (eps h)^(1/(2n+1)). It only matters in float16, whose range is small: at n = 1, with eps below 7e-5. A tensor
    eps is treated like such a small eps, since its values are not read.
    """
    if n > MAX_INVERTIBLE_N:
        return False
    if dtype != torch.float16:
        return True
    h = 2.0**-25
    return not isinstance(eps, Tensor) and 2 * n * h / (eps * h) ** (1 / (2 * n + 1)) <= 2.0**-11


def _preimage(y: Tensor, n: int, r: Real, e: Real, digits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Solves v^(2n+1) = w (v^2n + e) for v > 0, where w is the scaled y, clamped to [0, bound].

    The equation has one solution, between max(w, rho) and w + rho with rho = (e w)^(1/(2n+1)). Starting within 10 % of
    it, Halley's iteration on v - w - e w v^-2n = 0 cubes the error in each step.

    Returns:
        w, and a and b with v = a / b. The caller divides anyway, so the last division is left to it. For v, w is also
        clamped from below, to a positive number.
    """
    w = (y * r).clamp(0.0, bound(n, y.dtype))
    u = w.clamp(min=_smallest(y.dtype))
    h = u * e
    rho = h.pow(1 / (2 * n + 1)) if y.dtype == torch.float64 else rough_root(h, 2 * n + 1)
    v = torch.maximum(u, rho) + torch.minimum(u, rho) * (0.4 / n)
    d = v
    for step in range(_num_steps(n, digits)):
        if step > 0:
            v = v / d
        t = power(v, 2 * n)
        b = t * v
        p = b + h * (2 * n)
        f = (b - t * u) - h
        d = p * p + (h * f) * (n * (2 * n + 1))
        v = v * (d - f * p)
    return w, v, d


def _num_steps(n: int, digits: int) -> int:
    """Returns the number of steps after which `_preimage` gives the slope to a quarter of a rounding to `digits`.

    The error after one step is 1e-4 for n = 1, 5e-4 for n = 2 and 9e-4 for n = 3 and 4. After two steps it is 1e-9.
    """
    if digits > 24:
        return 3
    return 1 if digits <= (11 if n == 1 else 8) else 2


def _smallest(dtype: torch.dtype) -> float:
    """Returns the smallest scaled y that `_preimage` solves for. Its squares are normal and its slope negligible."""
    return 2.0**-200 if dtype == torch.float64 else 2.0**-40


EGEM = Family(
    name="egem",
    title="E-GEM",
    formula="x t / (t + eps) with t = x^(2n) for x > 0, else 0",
    exact=exact,
    value=value,
    slope=slope,
    slope_at=slope_at,
    inverse=inverse,
    invertible=invertible,
    eps_slope=eps_slope,
)
# GEM comes first in lists of names.
GEM = add(EGEM.fixed(eps=1.0, name="gem", title="GEM", formula="x^(2n+1) / (1 + x^(2n)) for x > 0, else 0"))
add(EGEM)
