"""All private APIs of torch that hf_gem uses. Look here first when a new version of torch breaks something.

This file imports nothing from hf_gem, so that the build of the kernels can load it by itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _NormBase as NormWithStatistics  # batch and instance normalisation of all kinds
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensorMode",
    "NormWithStatistics",
    "TorchDispatchMode",
    "children",
    "compile_cpp",
    "expect_compilations",
    "explain",
    "has_hooks",
    "in_dispatch_mode",
    "in_forward_ad",
    "in_functorch_transform",
    "is_local_scalar",
    "is_tracing",
    "lacks_own_memory",
    "module_buffers",
    "module_parameters",
    "reset_compiler",
    "tree_leaves",
    "uncompiled",
    "wait_on_device",
    "waits_for_device",
    "without_compiler",
]


# Torch has deprecated TorchScript. The release of hf_gem that supports this version of torch does without: then
# `GemActivation._scripted`, `__jit_unused_properties__`, `arithmetic.Real` and the comments on TorchScript in
# family/arithmetic.py go, which is all that it costs; a scripted module runs the formula of its family.
TORCHSCRIPT_ENDS = "2.16"


# ---- modes


def in_dispatch_mode() -> bool:
    """Returns whether a `TorchDispatchMode` is active: fake tensors, counters, `hf_gem.audit`."""
    return bool(torch._C._len_torch_dispatch_stack() > 0)


def in_functorch_transform() -> bool:
    """Returns whether a torch.func transform is active."""
    return bool(torch._C._are_functorch_transforms_active())


def in_forward_ad() -> bool:
    """Returns whether a level of forward-mode differentiation is open."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def is_tracing() -> bool:
    """Returns whether `torch.jit.trace` is running."""
    return bool(torch.jit.is_tracing())


# ---- tensors


def lacks_own_memory(tensor: Tensor) -> bool:
    """Returns whether a tensor has no memory, or memory that does not hold its values.

    Examples are lazily negated tensors, autograd's zero tensors and the batches of `jacobian(vectorize=True)`.
    """
    return tensor.is_neg() or tensor._is_zerotensor() or is_legacy_batchedtensor(tensor)


def is_local_scalar(operation: Any) -> bool:
    """Returns whether an aten operation reads one number from a tensor, as `tensor.item()` does."""
    return operation is torch.ops.aten._local_scalar_dense.default


def waits_for_device(operation: Any) -> bool:
    """Returns whether an aten operation waits for the GPU to read a number, or the size of its result."""
    return is_local_scalar(operation) or torch.Tag.dynamic_output_shape in operation.tags


def wait_on_device(cycles: int) -> None:
    """Keeps the current CUDA stream busy for some clock cycles, so that work queued meanwhile starts together."""
    torch.cuda._sleep(cycles)


# ---- modules


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Returns the submodules of a module by name: its own dict, not a copy."""
    return module._modules


def module_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Returns the buffers of a module by name: its own dict, not a copy."""
    return module._buffers


def module_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Returns the parameters of a module by name: its own dict, not a copy."""
    return module._parameters


def has_hooks(module: nn.Module) -> bool:
    """Returns whether any hooks, global ones included, run when a module is called."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())


# ---- the compiler, which is slow to import, so that it is only used if it is already loaded


def uncompiled(model: nn.Module) -> nn.Module | None:
    """Returns the model inside a `torch.compile` wrapper, or None if `model` is not a wrapper."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return None
    wrapped: nn.Module = model._orig_mod
    return wrapped


def without_compiler() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which compiled code runs uncompiled, and nothing is compiled."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


def reset_compiler() -> None:
    """Discards everything that was compiled."""
    import torch._dynamo

    torch._dynamo.reset()


def explain(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Reports how the compiler handles a call: `graphs`, `graph_break_count` and more."""
    import torch._dynamo

    return torch._dynamo.explain(function)(*args, **kwargs)


def compile_cpp(source: str, folder: Path, probes: Path) -> str:
    """Compiles C++ with the flags that Inductor uses on this machine, and returns the path of the library.

    Args:
        source: The C++ code.
        folder: Folder for all files of this compilation, including the library.
        probes: Folder for the small libraries with which Inductor finds out which vector instructions the compiler and
            the machine support. They are built once.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(probes)  # set before importing Inductor, which creates the folder
    from filelock import FileLock
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with FileLock(probes / "probes.lock"):
        for probe in probes.rglob("*.so"):
            if not Path(f"{probe}.load_ok").exists():
                probe.unlink()  # a process was killed while writing it: it would look like a missing instruction set
        pick_vec_isa()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    path: str = CppCodeCache.load(source)._name
    return path


def expect_compilations(count: int) -> None:
    """Lets torch recompile a function `count` times. Beyond that, it raises an error instead of running eagerly."""
    from torch._dynamo import config

    config.recompile_limit = config.accumulated_recompile_limit = count
    config.fail_on_recompile_limit_hit = True
