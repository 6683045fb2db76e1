"""The kernels on GPUs, in Triton: CUDA, ROCm and XPU alike, and any device through Triton's interpreter.

They compute in float32, with the quick division of the hardware: a division counts as two more roundings.
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
from ..family.formulas import cached_scale
from ..family.table import Family, family_named
from .printer import triton_source
from .triton_kernels import forward

_BYTES_A_PROGRAM = 4096  # of each tensor: two loads of 16 bytes for each of 128 threads
_NUM_WARPS = 4
interpreted = not isinstance(forward, triton.runtime.jit.JITFunction)


@functools.cache
def kernels(name: str, n: int) -> dict[str, Any]:
    """The kernels of a family for one n, by operation. Triton reads the source of a function, which is kept for it."""
    source = triton_source(family_named(name), n)
    file = f"<hf_gem {name} n={n}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    functions: dict[str, Any] = {"__name__": f"{__name__}.{name}_n{n}"}
    exec(compile(source, file, "exec"), functions)
    return functions


def launch(
    operation: str, family: Family, n: int, eps: float, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Runs one kernel; the tensors are dense, of one shape, layout, dtype and device."""
    x = inputs[0]
    numel = x.numel()
    block = _BYTES_A_PROGRAM // x.element_size()
    constants = {"BLOCK": block} if operation != "backward_at" else {"BLOCK": block, "DIGITS": digits(x.dtype)}
    with _on(x.device):
        kernels(family.kernels, n)[operation][(triton.cdiv(numel, block),)](
            *outputs, *inputs, numel, *cached_scale(eps, n), **constants, num_warps=_NUM_WARPS
        )


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type == "cpu":  # interpreted
        return contextlib.nullcontext()
    module = torch.get_device_module(device)
    return contextlib.nullcontext() if module.current_device() == device.index else module.device(device.index)
