"""What formulas of families are made of: scaling, powers and selections that neither overflow nor cancel.

A formula is a function of z, n, r and e, in which x enters as z in the working dtype and eps as two numbers:

- r, a power of two near eps^(-1/2n), and e = eps r^(2n), within a factor 2^n of 1. So `(z r)^(2n) / e` is
  `x^(2n) / eps`. Multiplying by r is exact, and the powers of z r stay in range.
- Past a bound the gate is 1 to rounding, and x no longer enters t. So t stays small, and autograd through the formulas
  gives the slopes everywhere, at infinity too.
- 1 - s is computed as e / (t + e), never as a difference, and keeps its relative accuracy down to underflow.

r and e are plain numbers, or tensors of the working dtype where eps is learnable. Formulas use products, sums,
divisions, selections, clamps and the functions below. The same code runs on tensors, is scripted by TorchScript, and is
read by the printer of the kernels (`hf_gem/_kernels/symbols.py`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    Real = float | Tensor
else:
    Real = Tensor  # what TorchScript reads; modules hand it tensors only

LEARNABLE_RANGE = (1e-37, 1e37)  # of a learnable eps, also while it is trained: what float32 holds
ONE_BITS = 127 << 23  # of 1.0 in float32
ROOT_BIAS = 350_000  # centres the error of a root taken on the bits, for all small n
_MAGIC, _MAGIC_BITS = 1.5 * 2.0**23, 0x4B400000  # a float32 whose spacing is 1, and its bits


def working(x: Tensor) -> Tensor:
    """x in the dtype that is computed in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def digits(dtype: torch.dtype) -> int:
    """Significant bits of a floating-point dtype."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


# ---- eps


def scale(eps: float, n: int) -> tuple[float, float]:
    """r and e of an eps, exactly."""
    k = math.floor(0.5 - math.log(eps) / (2 * n * math.log(2.0)))  # TorchScript has no log2
    return math.ldexp(1.0, k), math.ldexp(eps, 2 * n * k)


def scale_tensor(eps: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`scale` for a tensor in the working dtype. Only e carries a derivative: how eps is split changes nothing."""
    eps = saturated(eps)
    r = torch.pow(2.0, torch.floor(0.5 - torch.log2(eps.detach()) / (2 * n)))  # ONNX from TorchScript has no exp2
    e = eps
    for _ in range(2 * n):  # a factor at a time, since r^(2n) alone may overflow
        e = e * r
    return r, e


def saturated(eps: Tensor) -> Tensor:
    """An eps that runs away in training stays within LEARNABLE_RANGE, which TorchScript could not look up."""
    return eps.clamp(1e-37, 1e37)


def bound(n: int, dtype: torch.dtype) -> float:
    """The |z r| past which the gate rounds to 1: a power of two whose 2n-th power exceeds e 2^(digits + 3)."""
    num_digits = 53 if dtype == torch.float64 else 24
    return 2.0 ** math.ceil((num_digits + 3 + n) / (2 * n))


# ---- powers


def power(x: Tensor, k: int) -> Tensor:
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


def gate_power(v: Tensor, n: int) -> Tensor:
    """t = max(v, 0)^(2n) for the scaled v = z r, constant past the bound.

    It clamps, and does not select a constant: the compiler shares a constant among all layers, does not compute again
    what is selected far from the first use, and keeps that in float32 for the backward pass. At the bound itself the
    derivative of clamp depends on the version of torch, and that of the gate rounds to 0.
    """
    return power(v.clamp(0.0, bound(n, v.dtype)), 2 * n)


def positive(z: Tensor) -> Tensor:
    """max(z, 0), finite: infinity times a vanishing gate would be NaN, in autograd's unselected branches too."""
    largest = 1.7976931348623157e308 if z.dtype == torch.float64 else 3.4028234663852886e38
    return z.clamp(0.0, largest)


def complement(z: Tensor, n: int, r: Real, e: Real) -> tuple[Tensor, Tensor, Tensor]:
    """What 1 - s is made of for z > 0, with one division: t, whether z r is past the bound, and q.

    Up to the bound `1 - s = q e`; past it `q^(2n) e`, over the t at the bound, since t falls behind z r there.
    """
    t = gate_power(z * r, n)
    w = z * (r / bound(n, z.dtype))  # where z r overflows this does not, or all that it scales has vanished
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
    """`torch.where`, for a condition that hardly ever holds: kernels on a CPU skip `then` where no lane needs it."""
    if isinstance(condition, Tensor):
        return torch.where(condition, then, otherwise)
    else:  # noqa: RET505  # TorchScript leaves out a branch that is one, and not what follows a return
        return condition.rarely(then, otherwise)


def rough_root(h: Tensor, k: int) -> Tensor:
    """h^(1/k) within 4 %, for normal h: the bits of a float32, read as an integer, are all but its logarithm.

    They become a number, and the number bits, in the mantissa of one near 1.5 2^23, which is quicker than to convert.
    """
    logarithm = ((h.contiguous().view(torch.int32) >> 8) + (_MAGIC_BITS - (ONE_BITS >> 8))).view(torch.float32)
    root = logarithm * (1 / k) + _MAGIC * (1 - 1 / k)
    return ((root.view(torch.int32) << 8) + (ONE_BITS - ROOT_BIAS - (_MAGIC_BITS << 8) % 2**32)).view(torch.float32)
