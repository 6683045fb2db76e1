"""Chooses what computes an activation: the formulas, the C++ kernels or the Triton kernels.

Kernels take plain, real tensors on a device that they support. Everything else goes to the formulas, whose operations
other tools can see and replace: subclasses such as DTensor, dispatch modes (fake tensors, counters, `hf_gem.audit`),
the transforms of torch.func, and float64.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .._torch import in_dispatch_mode, in_functorch_transform, lacks_own_memory
from ..family.table import Family, family_named
from ..files import shown
from . import cpu, plain
from .printer import DTYPES

BACKENDS = ("auto", "eager", "compiled", "triton")
_GPUS = ("cuda", "xpu")
# Operation -> the index of the input that determines the strides of the results.
_LIKE = {"forward": 0, "backward": 1, "backward_at": 1, "glu": 0, "glu_backward": 1}


def _check(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"got {where}={shown(backend)}. {where} must be one of {', '.join(map(repr, BACKENDS))}. Write for example "
            "'auto'."
        )
    return backend


def _from_environment() -> str:
    return _check(os.environ.get("HF_GEM_KERNELS", "").lower() or "auto", "HF_GEM_KERNELS")


class _Block:
    """A `kernels` block. It equals no other one."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


# The blocks that are open, of all threads, in the order in which they were entered. The last one counts.
_blocks = [_Block(_from_environment())]
_triton_fails = False


def check_save(save: str, where: str = "save") -> str:
    if save not in ("auto", "input", "output"):
        raise ValueError(
            f"got {where}={shown(save)}. {where} must be 'auto', 'input' or 'output'. Write 'auto' if unsure."
        )
    return save


# The meaning of `save="auto"`. Set it to "output" to find, on a CPU, code that overwrites outputs that a GPU keeps.
_DEFAULT_SAVE = check_save(os.environ.get("HF_GEM_SAVE", "").lower() or "auto", "HF_GEM_SAVE")


@contextlib.contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Selects the backend of the activations inside a `with` block, for the whole process.

    The environment variable `HF_GEM_KERNELS` selects the backend from the start. If several blocks are open, also in
    different threads, the one that was entered last counts for all threads.

    If the kernels are not available, you get one warning, and the formulas are used instead. Inputs that no kernel
    supports, such as float64, tensor subclasses and a learnable eps, always use the formulas, without a warning.

    Args:
        backend: One of four backends. `"auto"` uses the Triton kernels on CUDA, ROCm and XPU. On a CPU it uses the C++
            kernels if they have been built, and until then the formulas, which give the same bits. A build starts in
            the background once a process has put 2^26 elements through backward passes of the formulas, or 2^30 through
            forward passes. It takes some ten seconds of one core, once per machine. `"eager"` uses the formulas, in
            plain torch. `"compiled"` uses the C++ kernels on a CPU and waits until they are built; on other devices it
            is the same as `"auto"`. `"triton"` uses the Triton kernels, for CPU tensors too if Triton's interpreter is
            on (TRITON_INTERPRET=1).

    Raises:
        ValueError: The backend is unknown.
    """
    block = _Block(_check(backend, "backend"))
    _blocks.append(block)
    try:
        yield
    finally:
        _blocks.remove(block)  # not the last one, which may be of another thread


def run(operation: str, family: Family, n: int, eps: float | Tensor, *inputs: Tensor) -> Any:
    """Computes one operation of a family.

    Args:
        operation: `forward` (x), `backward` (grad, x), `backward_at` (grad, y) for a family with `slope_at`, `glu`
            (gate, up) or `glu_backward` (grad, gate, up). The parentheses give its inputs.
        family: The family.
        n: The paper's N.
        eps: A positive number or a tensor. The formulas compute with a tensor.
        inputs: Tensors of the same shape.

    Returns:
        One tensor, or for `glu_backward` the gradients of gate and up. The strides are those that torch gives to
        elementwise results.
    """
    backend = _kernels_for(operation, family, n, eps, inputs)
    if backend is None:
        return plain.run(operation, family, n, eps, *inputs)
    outputs = _buffers(operation, family, n, inputs)
    strides = outputs[0].stride()
    # Kernels read a dense tensor as one block of memory. Other tensors are first copied into the layout of the result.
    dense = [x if x.stride() == strides or _runs_like(x, strides) else _copy(x, strides) for x in inputs]
    try:
        backend.launch(operation, family, n, eps, outputs, dense)
    except Exception as error:
        if backend is cpu or backend.interpreted:
            raise
        _give_up_triton(error)
        return plain.run(operation, family, n, eps, *inputs)
    return outputs if operation == "glu_backward" else outputs[0]


def _buffers(operation: str, family: Family, n: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Allocates the results with the strides that the formulas give."""
    like = inputs[_LIKE[operation]]
    if 1 not in like.shape:
        y = torch.empty_like(like)
    elif all(x.is_contiguous() for x in inputs):
        y = torch.empty_like(like, memory_format=torch.contiguous_format)
    else:
        kind = like.shape, like.dtype, like.device
        strides = _strides(operation, family.kernels, n, *kind, *(x.stride() for x in inputs))
        return tuple(like.new_empty_strided(like.shape, stride) for stride in strides)
    return (y, torch.empty_like(y)) if operation == "glu_backward" else (y,)


@functools.lru_cache(maxsize=1024)
def _strides(
    operation: str,
    kernels: str,
    n: int,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    *strides: tuple[int, ...],
) -> list[tuple[int, ...]]:
    """Finds the strides of the formulas' results by running them once for each layout.

    With a dimension of size 1, they depend on every operation of the formulas, and the meta device gives other ones.
    """
    inputs = (torch.empty_strided(shape, stride, dtype=dtype, device=device) for stride in strides)
    results = plain.run(operation, family_named(kernels), n, 1.0, *inputs)
    return [y.stride() for y in (results if isinstance(results, tuple) else (results,))]


def _runs_like(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Returns whether x has its elements in memory in the same order as a dense tensor with these strides."""
    return all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))


def _copy(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return x.new_empty_strided(x.shape, strides).copy_(x)


def keeps_output(family: Family, n: int, eps: float | Tensor, x: Tensor, save: str) -> bool:
    """Returns whether the backward pass keeps the output of `forward`; `hf_gem.functional.egem` documents the rule.

    Raises:
        ValueError: `save` is unknown, or not available for this function.
    """
    check_save(save)
    if save == "input":
        return False
    possible = family.slope_at is not None and family.invertible(n, eps, x.dtype)
    if save == "output" and not possible:
        raise ValueError(
            f"save='output' is not available for {family.name}, n={n}, eps={shown(eps)}, {x.dtype}. It requires a "
            "family that can be inverted, such as GEM and E-GEM with n <= 4; in float16 their eps must also be a plain "
            "number, at least 7e-5 for n=1. Use save='auto' or 'input'."
        )
    if save == "output":
        return True
    # A compiler decides itself what to keep, and cannot trace the choice of a kernel.
    if not possible or torch.compiler.is_compiling():
        return False
    if _DEFAULT_SAVE != "auto":
        return _DEFAULT_SAVE == "output"
    # On a CPU, the extra arithmetic takes longer than the pass over memory that it saves.
    return x.device.type in _GPUS and _kernels_for("forward", family, n, eps, (x,)) is not None


def _kernels_for(operation: str, family: Family, n: int, eps: float | Tensor, inputs: tuple[Tensor, ...]) -> Any:
    selected = _blocks[-1].backend
    if selected == "eager" or isinstance(eps, Tensor) or in_dispatch_mode():
        return None
    x = inputs[0]
    numel, dtype = x.numel(), x.dtype
    if numel == 0 or dtype not in DTYPES or in_functorch_transform():
        return None
    for other in inputs:
        if type(other) not in (Tensor, Parameter) or lacks_own_memory(other):
            return None
        if other is not x and (other.dtype != dtype or other.device != x.device):
            return None
    if x.is_cpu:
        if selected == "triton":
            return _interpreter() if not _triton_fails else None
        # Backward passes show that this is training. With inference alone, a build pays off later.
        work = numel if "backward" in operation else numel / 16
        return cpu if cpu.library(family.kernels, n).ready(work, wait=selected == "compiled") else None
    return _triton() if x.device.type in _GPUS and not _triton_fails else None


def _give_up_triton(error: Exception) -> None:
    """Switches to the formulas if Triton is installed but cannot launch kernels.

    This happens with an old driver, or if there is no C compiler, which Triton needs on NVIDIA GPUs. If the error came
    from the device and not from Triton, the formulas raise it again.
    """
    global _triton_fails
    _triton_fails = True
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    warnings.warn(
        "hf_gem uses its plain formulas on GPUs from now on, which take several passes over memory: Triton cannot "
        f"launch the kernels ({type(error).__name__}: {reason}). Triton needs a C compiler, and a driver as new as "
        "the CUDA version of torch.",
        stacklevel=3,
    )


@functools.cache
def _triton() -> Any:
    try:
        from . import gpu
    except ImportError as error:
        warnings.warn(
            "hf_gem uses its plain formulas on GPUs, which take several passes over memory: Triton cannot be imported "
            f"({error}). Install it with `pip install triton`.",
            stacklevel=2,
        )
        return None
    return gpu


@functools.cache
def _interpreter() -> Any:
    gpu = _triton()
    if gpu is None or gpu.interpreted:
        return gpu
    warnings.warn(
        "hf_gem uses its plain formulas on the CPU: the Triton kernels were selected, but Triton's interpreter is off. "
        "Set TRITON_INTERPRET=1 before the program starts.",
        stacklevel=2,
    )
    return None
