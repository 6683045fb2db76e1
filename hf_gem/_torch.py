"""All private torch that hf_gem uses: what to look at when a new version of torch breaks something.

Nothing of hf_gem is imported here, so that the build of the kernels can load this file by itself.
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
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "FakeTensorMode",
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
    """Whether a `TorchDispatchMode` is active: fake tensors, counters, `hf_gem.audit`."""
    return bool(torch._C._len_torch_dispatch_stack() > 0)


def in_functorch_transform() -> bool:
    """Whether a transform of torch.func is active."""
    return bool(torch._C._are_functorch_transforms_active())


def in_forward_ad() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def is_tracing() -> bool:
    """Whether `torch.jit.trace` runs."""
    return bool(torch.jit.is_tracing())


# ---- tensors


def lacks_own_memory(tensor: Tensor) -> bool:
    """Whether a tensor's memory does not hold its values, or is not there.

    Such are lazily negated tensors, zero tensors of autograd, and the batches of `jacobian(vectorize=True)`.
    """
    return tensor.is_neg() or tensor._is_zerotensor() or is_legacy_batchedtensor(tensor)


def is_local_scalar(operation: Any) -> bool:
    """Whether an operation of aten reads one number of a tensor, as `tensor.item()` does."""
    return operation is torch.ops.aten._local_scalar_dense.default


def waits_for_device(operation: Any) -> bool:
    """Whether an operation of aten waits for a GPU: it gives the host a number, or has a size that values decide."""
    return is_local_scalar(operation) or torch.Tag.dynamic_output_shape in operation.tags


def wait_on_device(cycles: int) -> None:
    """Keeps the current CUDA stream busy for some clock cycles, so that what is queued meanwhile starts together."""
    torch.cuda._sleep(cycles)


# ---- modules


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The submodules of a module by name, as the dict that it keeps."""
    return module._modules


def module_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module by name, as the dict that it keeps."""
    return module._buffers


def module_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module by name, as the dict that it keeps."""
    return module._parameters


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks watch the calls of a module, its own or global ones."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or _has_any_global_hook())


# ---- the compiler, which is slow to import, and is there where anything is compiled


def uncompiled(model: nn.Module) -> nn.Module | None:
    """What `torch.compile` has wrapped; None where a module is no such wrapper."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not isinstance(model, dynamo.OptimizedModule):
        return None
    wrapped: nn.Module = model._orig_mod
    return wrapped


def without_compiler() -> contextlib.AbstractContextManager[Any]:
    """A context in which whatever is compiled runs as it was written, and nothing is compiled."""
    loaded = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if loaded else contextlib.nullcontext()


def reset_compiler() -> None:
    """Forgets everything that was compiled."""
    import torch._dynamo

    torch._dynamo.reset()


def explain(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What the compiler makes of a call: `graphs`, `graph_break_count` and more."""
    import torch._dynamo

    return torch._dynamo.explain(function)(*args, **kwargs)


def compile_cpp(source: str, folder: Path, probes: Path) -> str:
    """Compiles C++ with the flags that Inductor uses on this machine, and returns the path of the library.

    Args:
        source: The code.
        folder: For all files of this compilation, the library among them.
        probes: For those that tell which vector instructions the compiler and the machine have. They are made once.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(probes)  # before Inductor is imported, which makes its folder
    from filelock import FileLock
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with FileLock(probes / "probes.lock"):
        for probe in probes.rglob("*.so"):
            if not Path(f"{probe}.load_ok").exists():
                probe.unlink()  # half written, by a process that was killed: it would pass for what cannot be had
        pick_vec_isa()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    path: str = CppCodeCache.load(source)._name
    return path


def expect_compilations(count: int) -> None:
    """Lets one function be compiled anew that often, for as many models; more is an error, not the eager mode."""
    from torch._dynamo import config

    config.recompile_limit = config.accumulated_recompile_limit = count
    config.fail_on_recompile_limit_hit = True
