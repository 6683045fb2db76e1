"""The one choice of what computes: the formulas, the C++ kernels or the Triton kernels.

Kernels take plain, real tensors on a device that they know. All else goes to the formulas, whose operations other tools
can see and take over: subclasses such as DTensor, dispatch modes (fake tensors, counters, `hf_gem.audit`), the
transforms of torch.func, float64.
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
from . import cpu, formulas
from .printer import DTYPES

BACKENDS = ("auto", "eager", "compiled", "triton")
_GPUS = ("cuda", "xpu")
# The input whose strides the results have.
_LIKE = {"forward": 0, "backward": 1, "backward_at": 1, "glu": 0, "glu_backward": 1}


def _check(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def _from_environment() -> str:
    return _check(os.environ.get("HF_GEM_KERNELS", "").lower() or "auto", "HF_GEM_KERNELS")


_selected = _from_environment()
_triton_fails = False


def check_save(save: str, where: str = "save") -> str:
    if save not in ("auto", "input", "output"):
        raise ValueError(f"{where} must be 'auto', 'input' or 'output', got {save!r}")
    return save


# What `save="auto"` means. With "output", a test on a CPU finds what overwrites outputs, which a GPU keeps.
_DEFAULT_SAVE = check_save(os.environ.get("HF_GEM_SAVE", "").lower() or "auto", "HF_GEM_SAVE")


@contextlib.contextmanager
def kernels(backend: str) -> Iterator[None]:
    """Chooses what computes the activations inside a `with` block, for the whole process.

    The environment variable `HF_GEM_KERNELS` sets it from the start.

    Args:
        backend: `"auto"`: Triton kernels on CUDA, ROCm and XPU; on a CPU the C++ kernels where they have been built,
            and until then the formulas, which give the same bits. Building starts in the background once a process has
            put 2^26 elements through backward passes of the formulas, or 2^30 through forward passes, takes some ten
            seconds of one core, and is done once for a machine. `"eager"`: the formulas, in plain operations of torch.
            `"compiled"`: the C++ kernels on a CPU, waiting for them to be built; on other devices as auto. `"triton"`:
            the Triton kernels, also for CPU tensors where Triton interprets (TRITON_INTERPRET=1). Where the kernels
            cannot be had, a warning says so once, and the formulas go on. What no kernel takes, such as float64,
            tensor subclasses and a learnable eps, goes to the formulas whatever is chosen, without a warning.

    Raises:
        ValueError: another backend.
    """
    global _selected
    _check(backend, "backend")
    before, _selected = _selected, backend
    try:
        yield
    finally:
        _selected = before


def run(operation: str, family: Family, n: int, eps: float | Tensor, *inputs: Tensor) -> Any:
    """Computes one operation of a family.

    Args:
        operation: `forward` (x), `backward` (grad, x), `backward_at` (grad, y) for a family with `slope_at`, `glu`
            (gate, up) or `glu_backward` (grad, gate, up).
        family: Any.
        n: The paper's N.
        eps: A positive number, or a tensor, which the formulas take.
        inputs: Tensors of one shape.

    Returns:
        One tensor; of `glu_backward`, the gradients of gate and up. Strides are those that torch gives to elementwise
        results.
    """
    backend = _kernels_for(operation, family, n, eps, inputs)
    if backend is None:
        return formulas.run(operation, family, n, eps, *inputs)
    outputs = _buffers(operation, family, n, inputs)
    strides = outputs[0].stride()
    # A dense tensor is one run of memory. Others are copied into one first: the buffer of a result has such strides.
    dense = [x if x.stride() == strides or _runs_like(x, strides) else _copy(x, strides) for x in inputs]
    try:
        backend.launch(operation, family, n, eps, outputs, dense)
    except Exception as error:
        if backend is cpu or backend.interpreted:
            raise
        _give_up_triton(error)
        return formulas.run(operation, family, n, eps, *inputs)
    return outputs if operation == "glu_backward" else outputs[0]


def _buffers(operation: str, family: Family, n: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Memory for the results, with the strides of those of the formulas."""
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
    """Those of what the formulas return for inputs of some strides. Where a dimension has one element, they follow from
    every single operation, and differ from those of tensors on the meta device."""
    inputs = (torch.empty_strided(shape, stride, dtype=dtype, device=device) for stride in strides)
    results = formulas.run(operation, family_named(kernels), n, 1.0, *inputs)
    return [y.stride() for y in (results if isinstance(results, tuple) else (results,))]


def _runs_like(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the elements of x are in memory in the order that these strides of a dense tensor give."""
    return all(size == 1 or a == b for size, a, b in zip(x.shape, x.stride(), strides, strict=True))


def _copy(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return x.new_empty_strided(x.shape, strides).copy_(x)


def keeps_output(family: Family, n: int, eps: float | Tensor, x: Tensor, save: str) -> bool:
    """Whether the backward pass is to keep the output of `forward`, by the rule of `hf_gem.functional.egem`.

    Raises:
        ValueError: `save` is not known, or not possible here.
    """
    check_save(save)
    if save == "input":
        return False
    possible = family.slope_at is not None and family.invertible(n, eps, x.dtype)
    if save == "output" and not possible:
        raise ValueError(
            f"save='output' is not available for {family.name}, n={n}, eps={eps!r}, {x.dtype}. It requires a family "
            "that can be inverted, such as GEM and E-GEM with n <= 4; in float16 their eps must also be a plain "
            "number, at least 7e-5 for n=1. Use save='auto' or 'input'"
        )
    if save == "output":
        return True
    # A compiler decides by itself what to keep, and cannot trace the choice of kernels.
    if not possible or torch.compiler.is_compiling():
        return False
    if _DEFAULT_SAVE != "auto":
        return _DEFAULT_SAVE == "output"
    # On a CPU, the arithmetic costs more than the pass over memory that it saves.
    return x.device.type in _GPUS and _kernels_for("forward", family, n, eps, (x,)) is not None


def _kernels_for(operation: str, family: Family, n: int, eps: float | Tensor, inputs: tuple[Tensor, ...]) -> Any:
    if _selected == "eager" or isinstance(eps, Tensor) or in_dispatch_mode():
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
        if _selected == "triton":
            return _interpreter() if not _triton_fails else None
        # Training is known by its backward passes. Inference has to go on for longer before a build pays.
        work = numel if "backward" in operation else numel / 16
        return cpu if cpu.library(family, n).ready(work, wait=_selected == "compiled") else None
    return _triton() if x.device.type in _GPUS and not _triton_fails else None


def _give_up_triton(error: Exception) -> None:
    """Where Triton is there and cannot launch: an image without a C compiler, which it needs on NVIDIA, an old driver.

    An error of the device that has nothing to do with it comes again, from the formulas.
    """
    global _triton_fails
    _triton_fails = True
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    warnings.warn(
        f"hf_gem computes with its plain formulas on GPUs from now on, in several passes over memory: Triton cannot "
        f"launch its kernels ({type(error).__name__}: {reason}). It needs a C compiler and a driver as new as torch's "
        "CUDA",
        stacklevel=3,
    )


@functools.cache
def _triton() -> Any:
    try:
        from . import gpu
    except ImportError as error:
        warnings.warn(
            f"hf_gem computes with its plain formulas on GPUs, in several passes over memory: Triton is not there "
            f"({error}). `pip install triton` brings it",
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
        "hf_gem computes tensors on the CPU with its plain formulas: Triton kernels were asked for, and Triton runs "
        "on a CPU only where TRITON_INTERPRET=1 is set from the start",
        stacklevel=2,
    )
    return None
