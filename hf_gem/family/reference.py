"""The formulas in plain torch: the one place that says what the functions are.

With `t = x^(2n)` and the gate `s = t / (t + eps)`:

    egem(x)  = x s          for x > 0, else 0         slope s (1 + 2n (1 - s)) for x > 0, else 0
    segem(x) = x            for x >= 0                slope 1
               x (1 - s)    for x < 0                 slope (1 - s) (1 - 2n s)

The C++ kernels do the same operations in the same order and give the same bits; change both together.

GEM is egem with eps = 1. Written so that no intermediate overflows and nothing cancels:

- x is multiplied by a power of two near eps^(-1/2n), which is exact and leaves an eps within a factor 2^n of 1;
- past a bound where the gate is 1 to rounding, x no longer enters t, so t stays small and autograd through these
  formulas gives the slopes above everywhere, at infinity too;
- 1 - s is computed as eps / (t + eps), never as a difference, and keeps its relative accuracy down to underflow.

Shapes and dtypes: any shape; float16 and bfloat16 are computed in float32 and rounded once at the end, float32 and
float64 in themselves. A tensor eps has to broadcast against x. The operations are products, sums, divisions,
selections and clamps; the functions annotated with a float eps can be scripted, and so can their `_tensor` twins.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

MAX_INVERTIBLE_N = 4  # the iterations of _preimage reach the accuracy of each dtype up to here
ONE_BITS = 127 << 23  # of 1.0 in float32
ROOT_BIAS = 350_000  # centres the error of a root taken on the bits, for all small n


def egem(x: Tensor, n: int, eps: float) -> Tensor:
    """E-GEM: `x s` for x > 0, else 0. GEM for eps = 1."""
    r, e = _scale(eps, n)
    z = working(x)
    t = _gate_power(z * r, n)
    # Past the bound t / (t + e) is 1 exactly, and the selection inside t keeps infinity out of its derivative.
    return (z.clamp(min=0.0) * (t / (t + e))).to(x.dtype)


def egem_tensor(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """`egem` with a tensor eps, differentiable in it."""
    z = working(x)
    r, e = _scale_tensor(eps.to(z.dtype), n)
    v = z * r
    t = _gate_power(v, n)
    # Past the bound x s rounds to x, but its derivative in eps does not round to zero.
    far = z - _remainder(z, z * (r / _bound(n, z.dtype)), n, e / (t + e))
    return torch.where(v > _bound(n, v.dtype), far, _positive(z) * (t / (t + e))).to(x.dtype)


def segem(x: Tensor, n: int, eps: float) -> Tensor:
    """SE-GEM: `x` for x >= 0, `x (1 - s)` for x < 0."""
    r, e = _scale(eps, n)
    z = working(x)
    v = -z * r
    return _segem(z, -z * (r / _bound(n, z.dtype)), n, e / (_gate_power(v, n) + e)).to(x.dtype)


def segem_tensor(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """`segem` with a tensor eps, differentiable in it."""
    z = working(x)
    r, e = _scale_tensor(eps.to(z.dtype), n)
    v = -z * r
    return _segem(z, -z * (r / _bound(n, z.dtype)), n, e / (_gate_power(v, n) + e)).to(x.dtype)


def egem_slope(x: Tensor, n: int, eps: float | Tensor) -> Tensor:
    """d egem / dx, in the working dtype of x."""
    z = working(x)
    r, e = _split(eps, z, n)
    t = _gate_power(z * r, n)
    s = t / (t + e)
    return s * ((1 + 2 * n) - s * (2 * n))


def egem_slope_at(y: Tensor, n: int, eps: float | Tensor) -> Tensor:
    """d egem / dx where egem is y, in the working dtype of y; 0 for y <= 0. For n up to MAX_INVERTIBLE_N.

    E-GEM is strictly increasing for x > 0 and d log x / d log y <= 1, so what a rounded y says of the slope is as good
    as what a rounded x says. y below 2^-40 eps^(1/2n) counts with a slope that is too small, by less than 2^-25.
    """
    w, v, _ = _preimage(y, n, eps)
    s = w / v
    return s * ((1 + 2 * n) - s * (2 * n))


def egem_inverse(y: Tensor, n: int, eps: float | Tensor) -> Tensor:
    """The x > 0 where egem is y, in the working dtype of y; 0 for y <= 0. For n up to MAX_INVERTIBLE_N."""
    w, v, (r, _) = _preimage(y, n, eps)
    z = working(y)
    # Far below the gate's scale y is x^(2n+1) / eps, far above it is x.
    k = 1 / (2 * n + 1)
    near_zero = z.clamp(min=0.0).pow(k) * (eps.to(z.dtype) if isinstance(eps, Tensor) else eps) ** k
    x = torch.where(w < _smallest(w.dtype), near_zero, v / r)
    return torch.where(w < _bound(n, w.dtype), x, z)


def segem_slope(x: Tensor, n: int, eps: float | Tensor) -> Tensor:
    """d segem / dx, in the working dtype of x."""
    z = working(x)
    r, e = _split(eps, z, n)
    t = _gate_power(-z * r, n)
    inverse = 1.0 / (t + e)
    c = inverse * e * _power(_excess(-z * (r / _bound(n, z.dtype))), 2 * n)
    return torch.where(z < 0, c * (1.0 - inverse * t * (2 * n)), 1.0)


def egem_eps_slope(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """d egem / d eps = -x s (1 - s) / eps for x > 0, else 0, in the working dtype of x; 0 where eps has saturated."""
    z = working(x)
    eps = eps.to(z.dtype)
    r, e = _scale_tensor(eps, n)
    t = _gate_power(z * r, n)
    saturated = _saturated(eps)
    slope = _remainder(z, z * (r / _bound(n, z.dtype)), n, e / (t + e)) * (t / (t + e)) / saturated
    return -slope * (eps == saturated)


def segem_eps_slope(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """d segem / d eps; segem(x) = x + egem(-x), so it is that of egem at -x."""
    return egem_eps_slope(-x, n, eps)


def working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _scale(eps: float, n: int) -> tuple[float, float]:
    """Splits eps into r = 2^k and e = eps r^(2n), exactly, with e within a factor 2^n of 1."""
    k = math.floor(0.5 - math.log(eps) / (2 * n * math.log(2.0)))  # TorchScript has no log2
    return math.ldexp(1.0, k), math.ldexp(eps, 2 * n * k)


def _saturated(eps: Tensor) -> Tensor:
    """An eps that runs away in training stays within spec.LEARNABLE_RANGE, which TorchScript could not look up."""
    return eps.clamp(1e-37, 1e37)


def _scale_tensor(eps: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`_scale` for a tensor. Only e carries a derivative: the functions do not depend on how eps is split."""
    eps = _saturated(eps)
    r = torch.pow(2.0, torch.floor(0.5 - torch.log2(eps.detach()) / (2 * n)))  # ONNX from TorchScript has no exp2
    e = eps
    for _ in range(2 * n):  # a factor at a time, since r^(2n) alone may overflow
        e = e * r
    return r, e


def _split(eps: float | Tensor, z: Tensor, n: int) -> tuple[Any, Any]:
    return _scale_tensor(eps.to(z.dtype), n) if isinstance(eps, Tensor) else _scale(eps, n)


@functools.cache
def scale_and_bound(n: int, eps: float) -> tuple[float, float, float]:
    """What a kernel in float32 needs to know of eps: the scaling r and e of x and eps, and the bound of the gate."""
    return *_scale(eps, n), _bound(n, torch.float32)


def invertible(n: int, eps: float | Tensor, dtype: torch.dtype) -> bool:
    """Whether the slope of E-GEM can be had from its output to within a rounding of `dtype`.

    Within MAX_INVERTIBLE_N it can, where outputs do not underflow too early: one that errs by half the smallest
    subnormal, h, has a slope that errs by 2n h / x, most where y is h itself and x = (eps h)^(1/(2n+1)). Only float16
    has so little range that it matters, at n = 1 with eps below 7e-5. A tensor eps counts as of that kind.
    """
    if n > MAX_INVERTIBLE_N:
        return False
    if dtype != torch.float16:
        return True
    h = 2.0**-25
    return not isinstance(eps, Tensor) and 2 * n * h / (eps * h) ** (1 / (2 * n + 1)) <= 2.0**-11


def _bound(n: int, dtype: torch.dtype) -> float:
    """The scaled |x| past which the gate rounds to 1: a power of two whose 2n-th power exceeds e 2^(digits + 3)."""
    digits = 53 if dtype == torch.float64 else 24
    return 2.0 ** math.ceil((digits + 3 + n) / (2 * n))


def _power(x: Tensor, k: int) -> Tensor:
    """x^k, k >= 1, by repeated squaring: at most k - 1 roundings. torch.pow would be autocast and is slower."""
    base = x
    result = x
    k = k - 1
    while k > 0:
        if k % 2 == 1:
            result = result * base
        k = k // 2
        if k > 0:
            base = base * base
    return result


def _positive(z: Tensor) -> Tensor:
    """max(z, 0), finite: infinity times a vanishing gate would be NaN, in autograd's unselected branches too."""
    largest = 1.7976931348623157e308 if z.dtype == torch.float64 else 3.4028234663852886e38
    return z.clamp(0.0, largest)


def _gate_power(v: Tensor, n: int) -> Tensor:
    bound = _bound(n, v.dtype)
    # A selection, since the derivative of clamp at its upper limit depends on the version of torch.
    return _power(torch.where(v >= bound, bound, v).clamp(min=0.0), 2 * n)


def _segem(z: Tensor, w: Tensor, n: int, c: Tensor) -> Tensor:
    return torch.where(z < 0, -_remainder(-z, w, n, c), z)


def _remainder(z: Tensor, w: Tensor, n: int, c: Tensor) -> Tensor:
    """`z (1 - s)` for z > 0, with w = v / bound and c = 1 - s at min(v, bound); past the bound 1 - s falls as v^-2n."""
    q = _excess(w)
    return (_positive(z) * q) * c * _power(q, 2 * n - 1)


def _excess(w: Tensor) -> Tensor:
    """1 / w past the bound, 1 before. Where v overflows, w = z (r / bound) does not, or all it scales has vanished."""
    return 1.0 / torch.where(w >= 1.0, w, 1.0)


def _preimage(y: Tensor, n: int, eps: float | Tensor) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    """The scaled y, kept in [0, bound], and the v > 0 with v^(2n+1) = w (v^2n + e) for w the same kept above 0.

    The equation has one solution, between max(w, rho) and w + rho with rho = (e w)^(1/(2n+1)). From a start within 10 %
    of it, Halley's iteration on v - w - e w v^-2n = 0 cubes the error: 1e-3 at most after one step, 3e-9 after two.
    """
    z = working(y)
    r, e = _split(eps, z, n)
    w = (z * r).clamp(0.0, _bound(n, z.dtype))
    u = w.clamp(min=_smallest(z.dtype))
    h = u * e
    rho = h.pow(1 / (2 * n + 1)) if z.dtype == torch.float64 else _rough_root(h, 2 * n + 1)
    v = torch.maximum(u, rho) + torch.minimum(u, rho) * (0.1 + 0.3 / n)
    for _ in range(inverse_steps(n, y.dtype)):
        t = _power(v, 2 * n)
        b = t * v
        p = b + h * (2 * n)
        f = (b - t * u) - h
        v = v - v * (f * p / (p * p + (h * f) * (n * (2 * n + 1))))
    return w, v, (r, e)


def inverse_steps(n: int, dtype: torch.dtype) -> int:
    """How many steps of `_preimage` leave less than a rounding of `dtype` in the slope."""
    if dtype == torch.float64:
        return 3
    return 1 if n == 1 and dtype != torch.float32 else 2


def _rough_root(h: Tensor, k: int) -> Tensor:
    """h^(1/k) within 4 %: the bits of a float32, read as an integer, are all but its logarithm."""
    logarithm = (h.contiguous().view(torch.int32) - ONE_BITS).to(torch.float32)
    return ((logarithm * (1 / k)).to(torch.int32) + (ONE_BITS - ROOT_BIAS)).view(torch.float32)


def _smallest(dtype: torch.dtype) -> float:
    """The scaled y from which on `_preimage` solves: the squares in it stay normal, and the slope there is nothing."""
    return 2.0**-200 if dtype == torch.float64 else 2.0**-40
