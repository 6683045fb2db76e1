"""The formulas in plain torch: the one place that says what the functions are.

With `t = x^(2n)` and the gate `s = t / (t + eps)`:

    egem(x)  = x s          for x > 0, else 0         slope s (1 + 2n (1 - s)) for x > 0, else 0
    segem(x) = x            for x >= 0                slope 1
               x (1 - s)    for x < 0                 slope (1 - s) (1 - 2n s)

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

import math
from typing import Any

import torch
from torch import Tensor


def egem(x: Tensor, n: int, eps: float) -> Tensor:
    """E-GEM: `x s` for x > 0, else 0. GEM for eps = 1."""
    r, e = _scale(eps, n)
    z = _working(x)
    t = _gate_power(z * r, n)
    # Past the bound t / (t + e) is 1 exactly, and the selection inside t keeps infinity out of its derivative.
    return (z.clamp(min=0.0) * (t / (t + e))).to(x.dtype)


def egem_tensor(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """`egem` with a tensor eps, differentiable in it."""
    z = _working(x)
    r, e = _scale_tensor(eps.to(z.dtype), n)
    v = z * r
    t = _gate_power(v, n)
    # Past the bound x s rounds to x, but its derivative in eps does not round to zero.
    far = z - _remainder(z, z * (r / _bound(n, z.dtype)), n, e / (t + e))
    return torch.where(v > _bound(n, v.dtype), far, _positive(z) * (t / (t + e))).to(x.dtype)


def segem(x: Tensor, n: int, eps: float) -> Tensor:
    """SE-GEM: `x` for x >= 0, `x (1 - s)` for x < 0."""
    r, e = _scale(eps, n)
    z = _working(x)
    v = -z * r
    return _segem(z, -z * (r / _bound(n, z.dtype)), n, e / (_gate_power(v, n) + e)).to(x.dtype)


def segem_tensor(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """`segem` with a tensor eps, differentiable in it."""
    z = _working(x)
    r, e = _scale_tensor(eps.to(z.dtype), n)
    v = -z * r
    return _segem(z, -z * (r / _bound(n, z.dtype)), n, e / (_gate_power(v, n) + e)).to(x.dtype)


def egem_slope(x: Tensor, n: int, eps: float | Tensor) -> Tensor:
    """d egem / dx, in the working dtype of x."""
    z = _working(x)
    r, e = _split(eps, z, n)
    t = _gate_power(z * r, n)
    s = t / (t + e)
    return s * torch.rsub(s, 1 + 2 * n, alpha=2 * n)


def segem_slope(x: Tensor, n: int, eps: float | Tensor) -> Tensor:
    """d segem / dx, in the working dtype of x."""
    z = _working(x)
    r, e = _split(eps, z, n)
    t = _gate_power(-z * r, n)
    c = e / (t + e) * _power(_excess(-z * (r / _bound(n, z.dtype))), 2 * n)
    return torch.where(z < 0, c * torch.rsub(t / (t + e), 1, alpha=2 * n), 1.0)


def egem_eps_slope(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """d egem / d eps = -x s (1 - s) / eps for x > 0, else 0, in the working dtype of x."""
    z = _working(x)
    eps = eps.to(z.dtype)
    r, e = _scale_tensor(eps, n)
    t = _gate_power(z * r, n)
    return -_remainder(z, z * (r / _bound(n, z.dtype)), n, e / (t + e)) * (t / (t + e)) / eps


def segem_eps_slope(x: Tensor, n: int, eps: Tensor) -> Tensor:
    """d segem / d eps; segem(x) = x + egem(-x), so it is that of egem at -x."""
    return egem_eps_slope(-x, n, eps)


def _working(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _scale(eps: float, n: int) -> tuple[float, float]:
    """Splits eps into r = 2^k and e = eps r^(2n), exactly, with e within a factor 2^n of 1."""
    k = math.floor(0.5 - math.log(eps) / (2 * n * math.log(2.0)))  # TorchScript has no log2
    return math.ldexp(1.0, k), math.ldexp(eps, 2 * n * k)


def _scale_tensor(eps: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`_scale` for a tensor. Only e carries a derivative: the functions do not depend on how eps is split."""
    eps = eps.clamp(1e-37, 1e37)  # spec.LEARNABLE_RANGE: an eps that runs away in training saturates there
    r = torch.pow(2.0, torch.floor(0.5 - torch.log2(eps.detach()) / (2 * n)))  # ONNX from TorchScript has no exp2
    e = eps
    for _ in range(2 * n):  # a factor at a time, since r^(2n) alone may overflow
        e = e * r
    return r, e


def _split(eps: float | Tensor, z: Tensor, n: int) -> tuple[Any, Any]:
    return _scale_tensor(eps.to(z.dtype), n) if isinstance(eps, Tensor) else _scale(eps, n)


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
