"""Runs a model without changing its state."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import NormWithStatistics, module_buffers, module_parameters, tree_leaves, uncompiled, without_compiler
from .slots import named_modules


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Converts a batch to positional and keyword arguments. Raises TypeError for an unsupported type."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(
        f"got a batch of type {type(batch).__name__}. A batch must be a tensor, a tuple of positional arguments or a "
        "dict of keyword arguments. Convert it to one of these."
    )


def run(model: nn.Module, batch: Any, batch_statistics: bool = False) -> Any:
    """Runs a model on a batch without changing its statistics, flags or caches.

    Args:
        model: The model, in any mode. It runs in evaluation mode.
        batch: Arguments of the model; see `arguments`.
        batch_statistics: Whether batch and instance normalisation use the statistics of the batch, as in training.

    Returns:
        The output of the model.

    Raises:
        ValueError: The model does not run on the batch.
    """
    args, kwargs = arguments(batch)
    model = unwrapped(model)
    try:
        with evaluating(model, (NormWithStatistics,) if batch_statistics else ()):
            return torch.func.functional_call(model, copied_buffers(model), args, kwargs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on a batch of data= ({type(error).__name__}: {error}). A batch must "
            "be a tensor, a tuple of positional arguments or a dict of keyword arguments, on the device of the model. "
            "Leave out everything that the model does not take, such as labels."
        ) from error


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Returns the floating-point tensors that a model returns for a batch."""
    return [leaf for leaf in tree_leaves(run(model, batch)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside the wrappers of torch.compile and data parallelism."""
    while True:
        inner = uncompiled(model)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all buffers, so that a forward pass can write to them."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@contextlib.contextmanager
def evaluating(model: nn.Module, training: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """Sets evaluation mode without gradients, compilation or fused encoder layers. Restores the model at the end.

    Values written into buffers are not restored; use `copied_buffers` for these. Neither are caches outside the
    modules, as in an `lru_cache`, or inside other objects than dicts, lists, sets and deques.

    Args:
        model: The model, in any mode.
        training: Module classes that stay in training mode.
    """
    devices = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(_restored(model))
        enter(torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind))
        enter(without_compiler())
        enter(torch.inference_mode(False))  # it hides operations from TorchDispatchMode
        enter(torch.no_grad())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for module in model.modules():
            module.training = isinstance(module, training)  # `model.eval()` may have effects, such as merging adapters
            if type(module) is nn.SyncBatchNorm:
                module.__class__ = _NoSyncBatchNorm
                stack.callback(setattr, module, "__class__", nn.SyncBatchNorm)
        yield


class _NoSyncBatchNorm(nn.SyncBatchNorm):
    """Normalises like SyncBatchNorm, but waits for no other process: these may not run the model."""

    forward = nn.BatchNorm1d.forward


_Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)  # subclasses may refuse to be changed
_BY_TORCH = vars(nn.Module()).keys()  # such as hooks, which lazy modules drop when they run


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restores everything that is set on the modules: training flags, and caches that a forward pass leaves.

    Parameters are restored too, since `torch.func.functional_call` does not restore those of a module that is used in
    several places.
    """
    held: dict[int, _Container] = {}
    for _, module in named_modules(model):
        own: tuple[_Container, ...] = (vars(module), module_buffers(module), module_parameters(module))
        held.update({id(container): container for container in own})
        for name in vars(module).keys() - _BY_TORCH:
            _find_containers(vars(module)[name], held)
    before = [(container, copy.copy(container)) for container in held.values()]
    try:
        yield
    finally:
        for container, content in before:
            container.clear()
            add: Any = container.extend if isinstance(container, (list, deque)) else container.update
            add(content)


def _find_containers(value: Any, found: dict[int, _Container]) -> None:
    """Adds a container and those inside it to `found`, by id."""
    if type(value) in _CONTAINERS and id(value) not in found:
        found[id(value)] = value
        for inner in value.values() if isinstance(value, dict) else value:
            _find_containers(inner, found)
