"""The kernels on GPUs, in Triton: CUDA, ROCm and XPU alike, and any device through Triton's interpreter.

`printer` writes the formulas of a family. They run in float32 with the quick division of the hardware: a division
counts as two more roundings. Every program handles BLOCK neighbouring elements of tensors that are dense and laid out
alike.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..family.arithmetic import digits, scale
from ..family.table import Family, family_named
from .printer import triton_source

_BYTES_A_PROGRAM = 4096  # of each tensor: two loads of 16 bytes for each of 128 threads
_NUM_WARPS = 4


@functools.cache
def _formulas(kernels: str, n: int) -> dict[str, Any]:
    """The functions of `printer.triton_source`. Triton reads the source of a function, which is kept for it here."""
    source = triton_source(family_named(kernels), n)
    name = f"<hf_gem {kernels} n={n}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    functions: dict[str, Any] = {"__name__": f"{__name__}.{kernels}_n{n}"}
    exec(compile(source, name, "exec"), functions)
    return functions


@triton.jit
def _block(numel, BLOCK: tl.constexpr):
    """Where this program's elements start, in int64, and which of them there are."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    return start, offsets, offsets < tl.minimum(numel - start, BLOCK).to(tl.int32)


@triton.jit
def _forward(y_ptr, x_ptr, numel, r, e, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    start, offsets, mask = _block(numel, BLOCK)
    x = tl.load(x_ptr + start + offsets, mask=mask).to(tl.float32)
    value, _ = FORMULA(x, r, e)
    tl.store(y_ptr + start + offsets, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward(out_ptr, grad_ptr, saved_ptr, numel, r, e, FORMULA: tl.constexpr, AT: tl.constexpr, BLOCK: tl.constexpr):
    """AT: whether FORMULA takes the output, and gives the slope alone."""
    start, offsets, mask = _block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    saved = tl.load(saved_ptr + start + offsets, mask=mask).to(tl.float32)
    if AT:
        slope = FORMULA(saved, r, e)
    else:
        _, slope = FORMULA(saved, r, e)
    tl.store(out_ptr + start + offsets, (grad * slope).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu(y_ptr, gate_ptr, up_ptr, numel, r, e, FORMULA: tl.constexpr, BLOCK: tl.constexpr):
    start, offsets, mask = _block(numel, BLOCK)
    gate = tl.load(gate_ptr + start + offsets, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + start + offsets, mask=mask).to(tl.float32)
    value, _ = FORMULA(gate, r, e)
    tl.store(y_ptr + start + offsets, (value * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _glu_backward(
    grad_gate_ptr, grad_up_ptr, grad_ptr, gate_ptr, up_ptr, numel, r, e, FORMULA: tl.constexpr, BLOCK: tl.constexpr
):
    start, offsets, mask = _block(numel, BLOCK)
    grad = tl.load(grad_ptr + start + offsets, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + start + offsets, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + start + offsets, mask=mask).to(tl.float32)
    value, slope = FORMULA(gate, r, e)
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


def launch(
    operation: str, family: Family, n: int, eps: float, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Runs one kernel; the tensors are dense, of one shape, layout, dtype and device."""
    x = inputs[0]
    numel = x.numel()
    block = _BYTES_A_PROGRAM // x.element_size()
    at = operation == "backward_at"
    formula = _formulas(family.kernels, n)[f"slope_at_{digits(x.dtype)}" if at else "value_and_slope"]
    constants: dict[str, Any] = {"FORMULA": formula, "BLOCK": block}
    if operation.startswith("backward"):
        constants["AT"] = at
    with _on(x.device):
        _KERNELS[operation][(triton.cdiv(numel, block),)](
            *outputs, *inputs, numel, *scale(eps, n), **constants, num_warps=_NUM_WARPS
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if module.current_device() == device.index else module.device(device.index)
