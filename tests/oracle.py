"""Exact values of the family, from its definitions alone: it is rational, so `fractions.Fraction` holds every value.

Nothing here imports hf_gem. With t = x^(2n) and s = t / (t + eps):

    egem(x) = x s for x > 0, else 0          segem(x) = x for x >= 0, else x (1 - s)
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

# Significant bits (the leading one counts) and the exponent of the smallest normal number.
FORMATS = {
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}


def egem(x: Fraction, n: int, eps: Fraction) -> Fraction:
    return x * gate(x, n, eps) if x > 0 else Fraction(0)


def egem_slope(x: Fraction, n: int, eps: Fraction) -> Fraction:
    s = gate(x, n, eps)
    return s * (1 + 2 * n * (1 - s)) if x > 0 else Fraction(0)


def egem_eps_slope(x: Fraction, n: int, eps: Fraction) -> Fraction:
    s = gate(x, n, eps)
    return -x * s * (1 - s) / eps if x > 0 else Fraction(0)


def segem(x: Fraction, n: int, eps: Fraction) -> Fraction:
    return x * (1 - gate(x, n, eps)) if x < 0 else x


def segem_slope(x: Fraction, n: int, eps: Fraction) -> Fraction:
    s = gate(x, n, eps)
    return (1 - s) * (1 - 2 * n * s) if x < 0 else Fraction(1)


def segem_eps_slope(x: Fraction, n: int, eps: Fraction) -> Fraction:
    s = gate(x, n, eps)
    return x * s * (1 - s) / eps if x < 0 else Fraction(0)


def gate(x: Fraction, n: int, eps: Fraction) -> Fraction:
    t = x ** (2 * n)
    return t / (t + eps)


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding: half the distance from 1 to the next number."""
    return 2.0 ** -FORMATS[dtype][0]


def min_normal(dtype: torch.dtype) -> float:
    return 2.0 ** FORMATS[dtype][1]


def ulp(value: Fraction, dtype: torch.dtype) -> Fraction:
    """The distance between neighbouring numbers of `dtype` around `value`, that of the subnormals near 0."""
    digits, min_exponent = FORMATS[dtype]
    return Fraction(2) ** (max(_exponent(value), min_exponent) - digits + 1)


def error_in_ulps(got: float, exact: Fraction, dtype: torch.dtype) -> float:
    return float(abs(Fraction(got) - exact) / ulp(exact, dtype))


def round_exact(value: Fraction, dtype: torch.dtype) -> float:
    """`value` rounded once to `dtype`, ties to even, as a Python float."""
    quantum = ulp(value, dtype)
    rounded = round(value / quantum) * quantum
    return math.copysign(math.inf, value) if abs(rounded) >= _overflow(dtype) else float(rounded)


def round_array(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 `values` rounded once to a narrower `dtype`; torch would round a half type twice, through float32."""
    digits, min_exponent = FORMATS[dtype]
    exponents = np.maximum(np.frexp(values)[1] - 1, min_exponent)
    quantum = np.ldexp(1.0, exponents - digits + 1)
    rounded = np.where(np.isfinite(values), np.rint(values / quantum) * quantum, values)
    return np.where(np.abs(rounded) >= float(_overflow(dtype)), np.copysign(np.inf, rounded), rounded)


def _exponent(value: Fraction) -> int:
    """floor(log2 |value|), exactly."""
    if value == 0:
        return -(10**6)
    numerator, denominator = abs(value.numerator), value.denominator
    guess = numerator.bit_length() - denominator.bit_length()
    shifted = (numerator, denominator << guess) if guess >= 0 else (numerator << -guess, denominator)
    return guess if shifted[0] >= shifted[1] else guess - 1


def _overflow(dtype: torch.dtype) -> Fraction:
    """The first power of two that `dtype` cannot hold."""
    return Fraction(2) ** (2 - FORMATS[dtype][1])
