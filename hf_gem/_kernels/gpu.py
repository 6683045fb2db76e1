"""The family on GPUs, in Triton: CUDA, ROCm and XPU alike, and any device through Triton's interpreter.

These are the formulas of `reference` in float32, with the quick division of the hardware: a division counts as two more
roundings. Every program handles BLOCK neighbouring elements of tensors that are dense and laid out alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..family import reference

_BYTES_A_PROGRAM = 4096  # of each tensor: two loads of 16 bytes for each of 128 threads
_NUM_WARPS = 4


@triton.jit
def _gate_power(v, N: tl.constexpr):
    square = v * v
    t = square
    for _ in tl.static_range(N - 1):
        t = t * square
    return t


@triton.jit
def _value_and_slope(x, r, e, bound, N: tl.constexpr, SIGNED: tl.constexpr):
    if SIGNED:
        t = _gate_power(-x * r, N)  # infinite where it overflows, and 1 - s is 0 there
        inverse = 1.0 / (t + e)
        c = inverse * e
        s = inverse * tl.minimum(t, 3.4028234663852886e38)
        finite = tl.maximum(x, -3.4028234663852886e38)
        value = tl.where(x < 0, finite * c, x)
        slope = tl.where(x < 0, c * (1.0 - 2 * N * s), 1.0)
    else:
        v = x * r
        t = _gate_power(tl.where(v > bound, bound, v), N)
        s = t / (t + e)
        # Comparisons so that NaN stays.
        value = tl.where(x <= 0, 0.0, x * s)
        slope = tl.where(x <= 0, 0.0, s * ((1 + 2 * N) - 2 * N * s))
    return value, slope


@triton.jit
def _slope_at(y, r, e, bound, N: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr, BIAS: tl.constexpr):
    """`reference.egem_slope_at`."""
    w = y * r
    w = tl.where(w > bound, bound, w)
    u = tl.maximum(w, 9.094947017729282e-13)
    h = u * e
    logarithm = (h.to(tl.int32, bitcast=True) - ONE).to(tl.float32)
    rho = ((logarithm * (1.0 / (2 * N + 1))).to(tl.int32) + (ONE - BIAS)).to(tl.float32, bitcast=True)
    v = tl.maximum(u, rho) + tl.minimum(u, rho) * (0.1 + 0.3 / N)
    for _ in tl.static_range(STEPS):
        t = _gate_power(v, N)
        b = t * v
        p = b + 2 * N * h
        f = b - t * u - h
        v = v - v * (f * p / (p * p + (N * (2 * N + 1)) * (h * f)))
    s = w / v
    return tl.where(y <= 0, 0.0, s * ((1 + 2 * N) - 2 * N * s))


@triton.jit
def _block(numel, BLOCK: tl.constexpr):
    """Where this program's elements start, in int64, and which of them there are."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    return start, offsets, offsets < tl.minimum(numel - start, BLOCK).to(tl.int32)


@triton.jit
def _forward(y_ptr, x_ptr, numel, r, e, bound, N: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start, offsets, mask = _block(numel, BLOCK)
    x = tl.load(x_ptr + start + offsets, mask=mask).to(tl.float32)
    value, _ = _value_and_slope(x, r, e, bound, N, SIGNED)
    tl.store(y_ptr + start + offsets, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    out_ptr, grad_ptr, saved_ptr, numel, r, e, bound,
    N: tl.constexpr, SIGNED: tl.constexpr, STEPS: tl.constexpr, ONE: tl.constexpr, BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """STEPS = 0: from the input; otherwise from the output, by that many steps."""
    start, offsets, mask = _block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    saved = tl.load(saved_ptr + start + offsets, mask=mask).to(tl.float32)
    if STEPS == 0:
        _, slope = _value_and_slope(saved, r, e, bound, N, SIGNED)
    else:
        slope = _slope_at(saved, r, e, bound, N, STEPS, ONE, BIAS)
    tl.store(out_ptr + start + offsets, (grad * slope).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu(y_ptr, gate_ptr, up_ptr, numel, r, e, bound, N: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    start, offsets, mask = _block(numel, BLOCK)
    gate = tl.load(gate_ptr + start + offsets, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + start + offsets, mask=mask).to(tl.float32)
    value, _ = _value_and_slope(gate, r, e, bound, N, SIGNED)
    tl.store(y_ptr + start + offsets, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_backward(
    grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, numel, r, e, bound,
    N: tl.constexpr, SIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start, offsets, mask = _block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + start + offsets, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + start + offsets, mask=mask).to(tl.float32)
    value, slope = _value_and_slope(gate, r, e, bound, N, SIGNED)
    tl.store(grad_gate_ptr + start + offsets, (grad * up * slope).to(grad_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_up_ptr + start + offsets, (grad * value).to(grad_up_ptr.dtype.element_ty), mask=mask)


_KERNELS = {
    "forward": _forward,
    "backward": _backward,
    "backward_at": _backward,
    "glu": _glu,
    "glu_backward": _glu_backward,
}
interpreted = not isinstance(_forward, triton.runtime.jit.JITFunction)


def launch(operation: str, form: str, n: int, eps: float, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Runs one kernel; the tensors are dense, of one shape, layout, dtype and device."""
    x = inputs[0]
    numel = x.numel()
    block = _BYTES_A_PROGRAM // x.element_size()
    r, e, bound = reference.scale_and_bound(n, eps)
    constants: dict[str, Any] = {"N": n, "SIGNED": form == "segem", "BLOCK": block}
    if operation.startswith("backward"):
        steps = reference.inverse_steps(n, x.dtype) if operation == "backward_at" else 0
        constants |= {"STEPS": steps, "ONE": reference.ONE_BITS, "BIAS": reference.ROOT_BIAS}
    with _on(x.device):
        _KERNELS[operation][(triton.cdiv(numel, block),)](
            *outputs, *inputs, numel, r, e, bound, **constants, num_warps=_NUM_WARPS
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if module.current_device() == device.index else module.device(device.index)
