"""Building blocks of the formulas: scaling, powers and selections that neither overflow nor cancel.

A formula is a function of z, n, r and e. z is x in the working dtype, and two numbers stand for eps:

- r is a power of two near eps^(-1/2n), and e = eps r^(2n) is within a factor 2^n of 1. So `(z r)^(2n) / e` equals
  `x^(2n) / eps`. Multiplying by r is exact, and the powers of z r stay in range.
- Past a bound, the gate rounds to 1 and t no longer depends on x. So t stays small, and autograd through the formulas
  gives correct slopes everywhere, including at infinity.
- 1 - s is computed as e / (t + e), never as a difference, so it keeps its relative accuracy down to underflow.

r and e are plain numbers, or tensors of the working dtype if eps is learnable. Formulas use products, sums, divisions,
selections, clamps and the functions below. The same code runs on tensors, is scripted by TorchScript, and is read by
the printer of the kernels (`hf_gem/_kernels/symbols.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

if TYPE_CHECKING:
    Real = float | Tensor
else:
    Real = Tensor  # for TorchScript; modules only pass it tensors

LEARNABLE_RANGE = (1e-37, 1e37)  # limits of a learnable eps, also during training; float32 can hold them
ONE_BITS = 127 << 23  # bits of 1.0 in float32
ROOT_BIAS = 350_000  # centres the error of `rough_root`, for all small n
_MAGIC, _MAGIC_BITS = 1.5 * 2.0**23, 0x4B400000  # a float32 whose spacing is 1, and its bits


def working(x: Tensor) -> Tensor:
    """Converts x to the dtype of the computation: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def digits(dtype: torch.dtype) -> int:
    """Returns the number of significant bits of a floating-point dtype."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


# ---- eps


def scale(eps: float, n: int) -> tuple[float, float]:
    """Splits eps into r and e, exactly."""
    k = math.floor(0.5 - math.log(eps) / (2 * n * math.log(2.0)))  # TorchScript has no log2
    return math.ldexp(1.0, k), math.ldexp(eps, 2 * n * k)


def scale_tensor(eps: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`scale` for a tensor in the working dtype. Only e carries a derivative, since the choice of r is arbitrary."""
    eps = saturated(eps)
    r = torch.pow(2.0, torch.floor(0.5 - torch.log2(eps.detach()) / (2 * n)))  # ONNX from TorchScript has no exp2
    e = eps
    for _ in range(2 * n):  # one factor at a time, since r^(2n) alone may overflow
        e = e * r
    return r, e


def learnable_eps(log_ratio: Tensor, init_eps: float) -> Tensor:
    """Returns `init_eps * exp(log_ratio)`, in float32 for half types.

    log_ratio is clamped to -87..87, where exp is finite in float32, so eps changes by a factor of 6e37 at most. These
    limits do not depend on init_eps, since a compiler would make a graph for each value. eps is also saturated.
    """
    if has_torch_function_unary(log_ratio):  # one node for torch.fx, which cannot trace a branch on a dtype
        return handle_torch_function(learnable_eps, (log_ratio,), log_ratio, init_eps)
    if log_ratio.dtype != torch.float64:
        log_ratio = log_ratio.to(torch.float32)
    return saturated(init_eps * torch.exp(log_ratio.clamp(-87.0, 87.0)))


def saturated(eps: Tensor) -> Tensor:
    """Clamps a learnable eps to LEARNABLE_RANGE, in case it runs away in training."""
    return eps.clamp(1e-37, 1e37)  # literal, since TorchScript cannot read LEARNABLE_RANGE


def bound(n: int, dtype: torch.dtype) -> float:
    """Returns the |z r| above which the gate rounds to 1: a power of two whose 2n-th power exceeds e 2^(digits + 3)."""
    num_digits = 53 if dtype == torch.float64 else 24
    return 2.0 ** math.ceil((num_digits + 3 + n) / (2 * n))


# ---- powers


def power(x: Tensor, k: int) -> Tensor:
    """x^k for k >= 1 by repeated squaring, with at most k - 1 roundings. torch.pow is slower and autocast."""
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


def gate_power(v: Tensor, n: int) -> Tensor:
    """t = max(v, 0)^(2n) for the scaled v = z r, constant past the bound.

    This clamps instead of selecting a constant: the compiler shares a constant among all layers, does not recompute a
    selection far from its first use, and so keeps it in float32 for the backward pass. At the bound itself, the
    derivative of clamp depends on the version of torch, but the derivative of the gate rounds to 0 there.
    """
    return power(v.clamp(0.0, bound(n, v.dtype)), 2 * n)


def positive(z: Tensor) -> Tensor:
    """max(z, 0), kept finite: infinity times a vanishing gate is NaN, even in branches that are not selected."""
    largest = 1.7976931348623157e308 if z.dtype == torch.float64 else 3.4028234663852886e38
    return z.clamp(0.0, largest)


def complement(z: Tensor, n: int, r: Real, e: Real) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the parts of 1 - s for z > 0, computed with one division.

    Returns:
        t, whether z r is past the bound, and q. Up to the bound, `1 - s = q e`. Past it, t stays constant and
        `1 - s = q^(2n) e` over the t at the bound.
    """
    t = gate_power(z * r, n)
    w = z * (r / bound(n, z.dtype))  # this does not overflow where z r does, or its result no longer matters
    far = w >= 1.0
    return t, far, 1.0 / torch.where(far, w, t + e)


def remainder(z: Tensor, n: int, r: Real, e: Real) -> Tensor:
    """`z (1 - s)` for z > 0."""
    _, far, q = complement(z, n, r, e)
    x = positive(z) * q
    return rarely(far, x * power(q, 2 * n - 1) * at_bound(n, z.dtype), x) * e


def at_bound(n: int, dtype: torch.dtype) -> float:
    """1 / t at the bound."""
    return bound(n, dtype) ** (-2 * n)


def rarely(condition: Tensor, then: Tensor, otherwise: Tensor) -> Tensor:
    """`torch.where` for a condition that rarely holds: CPU kernels skip `then` if no lane needs it."""
    if isinstance(condition, Tensor):
        return torch.where(condition, then, otherwise)
    else:  # noqa: RET505  # TorchScript skips an `else` branch, but not code after a return
        return condition.rarely(then, otherwise)


def rough_root(h: Tensor, k: int) -> Tensor:
    """h^(1/k) to within 4 %, for normal h, since the bits of a float32, read as an integer, approximate its logarithm.

    Bits become a number, and the number becomes bits again, through the mantissa of a float near 1.5 2^23. That is
    faster than a conversion.
    """
    logarithm = ((h.contiguous().view(torch.int32) >> 8) + (_MAGIC_BITS - (ONE_BITS >> 8))).view(torch.float32)
    root = logarithm * (1 / k) + _MAGIC * (1 - 1 / k)
    return ((root.view(torch.int32) << 8) + (ONE_BITS - ROOT_BIAS - (_MAGIC_BITS << 8) % 2**32)).view(torch.float32)
