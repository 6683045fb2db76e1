"""The Triton kernels for GPUs (CUDA, ROCm and XPU), and for any device through Triton's interpreter.

They compute in float32. Those for float32 tensors return the bits of our families' formulas: they wait for memory
anyway, so a division that is rounded correctly takes no time. Those for the half types, and the slope from the output,
use the fast division of the hardware, which adds two roundings for divisors from 2^-126 to 2^126, and fuse products
with sums.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..family.arithmetic import digits
from ..family.table import Family, family_named
from .printer import numbers, triton_source
from .triton_kernels import forward

_BYTES_A_PROGRAM = 4096  # of each tensor: two loads of 16 bytes for each of 128 threads
NUM_WARPS = 4
ALIGNMENT = 16  # bytes: Triton compiles wide loads for pointers with this alignment
interpreted = not isinstance(forward, triton.runtime.jit.JITFunction)
# Triton looks up compiled kernels by all their arguments, which takes longer than a small kernel runs.
_compiled: dict[tuple[str, str, int, torch.dtype, torch.device], Any] = {}


def is_exact(operation: str, dtype: torch.dtype) -> bool:
    """Returns whether a kernel returns the bits of the formulas."""
    return dtype == torch.float32 and operation != "backward_at"  # which would take 15 % longer on an H100


@functools.cache
def kernels(name: str, n: int, exact: bool) -> dict[str, Any]:
    """Returns the kernels of a family for one n, by operation. Puts their source into `linecache`, for Triton."""
    source = triton_source(family_named(name), n, exact)
    file = f"<hf_gem {name} n={n}{' exact' if exact else ''}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    functions: dict[str, Any] = {"__name__": f"{__name__}.{name}_n{n}"}
    exec(compile(source, file, "exec"), functions)
    return functions


def options(exact: bool) -> dict[str, Any]:
    """Returns the options with which Triton compiles a kernel."""
    return {"num_warps": NUM_WARPS, "enable_fp_fusion": not exact}


@functools.cache
def constants(operation: str, dtype: torch.dtype) -> dict[str, int]:
    """Returns the compile-time constants of a kernel, in the order of its arguments."""
    wanted = {"DIGITS": digits(dtype)} if operation == "backward_at" else {}
    return {**wanted, "BLOCK": _BYTES_A_PROGRAM // dtype.itemsize}


def launch(
    operation: str, family: Family, n: int, eps: float, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Runs one kernel. The tensors must be dense, with the same shape, layout, dtype and device."""
    x = inputs[0]
    numel, device = x.numel(), x.device
    key = operation, family.kernels, n, x.dtype, device
    compiled = _compiled.get(key)
    chosen = constants(operation, x.dtype)
    pointers = [tensor.data_ptr() for tensor in (*outputs, *inputs)]
    aligned = not any(pointer % ALIGNMENT for pointer in pointers)
    grid = (-(-numel // chosen["BLOCK"]), 1, 1)
    others = (numel, *numbers(family.kernels, n, eps), *chosen.values())
    with _on(device):
        if compiled is not None and aligned:
            compiled[grid](*pointers, *others)
            return
        exact = is_exact(operation, x.dtype)
        kernel = kernels(family.kernels, n, exact)[operation]
        compiled = kernel[grid](*outputs, *inputs, *others, **options(exact))
    if aligned and not interpreted:
        _compiled[key] = compiled


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that makes the device of the tensors the current one, since Triton launches there."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if module.current_device() == device.index else module.device(device.index)
