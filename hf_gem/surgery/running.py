"""Running a model without leaving a trace on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import module_buffers, module_parameters, tree_leaves, uncompiled, without_compiler


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that a batch stands for, or TypeError."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        return tuple(batch), {}
    raise TypeError(f"a batch is a tensor, a tuple of arguments or a dict of keyword ones, got {type(batch).__name__}")


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def run(model: nn.Module, batch: Any, batch_statistics: bool = False) -> Any:
    """What a model returns for a batch, which leaves no trace on it: no statistics, flags or caches.

    Args:
        model: In any mode; it runs in evaluation mode.
        batch: Its arguments.
        batch_statistics: Whether batch normalisation takes the statistics of the batch all the same.
    """
    args, kwargs = arguments(batch)
    model = unwrapped(model)
    try:
        with evaluating(model, _BATCH_NORMS if batch_statistics else ()):
            return torch.func.functional_call(model, copied_buffers(model), args, kwargs)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} does not run on a batch of data= ({type(error).__name__}: {error}); a batch is a "
            "tensor, a tuple of the positional or a dict of the keyword arguments of the model, on its device, without "
            "what the model does not take, such as labels"
        ) from error


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The floating-point tensors that a model returns for a batch."""
    return [leaf for leaf in tree_leaves(run(model, batch)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of torch.compile and of data parallelism."""
    while True:
        inner = uncompiled(model)
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a forward pass may write to."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


@contextlib.contextmanager
def evaluating(model: nn.Module, training: tuple[type[nn.Module], ...] = ()) -> Iterator[None]:
    """Evaluation mode without gradients, compilation and fused encoder layers; on leaving, all is as it was.

    But for what is written into buffers: see `copied_buffers`.

    Args:
        model: Whatever mode it is in.
        training: Classes of modules that are in training mode meanwhile.
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
            module.training = isinstance(module, training)  # `model.eval()` may do more, such as merging adapters
        yield


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Takes back what is set on the modules meanwhile: training flags, and caches that a forward pass leaves.

    Parameters too: `torch.func.functional_call` does not put back those of a module that stands in several places.
    """
    before = [
        (module, dict(vars(module)), dict(module_buffers(module)), dict(module_parameters(module)))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, parameters in before:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module_buffers(module).clear()
            module_buffers(module).update(buffers)
            module_parameters(module).clear()
            module_parameters(module).update(parameters)
