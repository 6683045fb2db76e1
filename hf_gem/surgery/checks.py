"""Checks whether a model can be converted, and whether the arguments of `convert` make sense."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..family.names import GemSpec, parse
from ..files import shown
from ..fit import MATCH_C
from .scales import check_match
from .slots import Slot, no_submodule

_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_QUANTISED = ("torch.ao.nn.quantized.modules", "torch.ao.nn.intrinsic.quantized.modules")
_NOT_QUANTISED = ("FloatFunctional", "PackedParams", "Embedding", "EmbeddingBag")  # embeddings output floats


def check_arguments(
    model: nn.Module, name: str, eps: float | str | None, data: Any, per_layer: bool, fit_to: str, c: float
) -> GemSpec:
    """Checks the model and the arguments of `convert`, and returns the member that they name.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the model cannot be converted.
    """
    if not isinstance(model, nn.Module):
        built = "Build it first" if isinstance(model, type) else "Pass the model itself"
        raise TypeError(
            f"got {type(model).__name__} as model. model must be a torch.nn.Module. {built}, or use "
            "hf_gem.set_activation for a config."
        )
    spec = parse(name)
    if fit_to not in ("output", "activations"):
        raise ValueError(f"got fit_to={shown(fit_to)}. It must be 'output' or 'activations'. The default is 'output'.")
    _check_choice_of_eps(spec, eps, data, per_layer, c)
    if isinstance(data, (Tensor, Mapping, str)) or (data is not None and not isinstance(data, Iterable)):
        raise TypeError(
            f"got data of type {type(data).__name__}. data must be an iterable of batches. For one batch, write "
            "data=[batch]."
        )
    if eps is not None and not isinstance(eps, str):
        spec = GemSpec(spec.family, spec.n, eps, spec.learnable)
    for path, module in model.named_modules():
        home = type(module).__module__
        where = f"{path or 'the model'} is a {home}.{type(module).__name__}"
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where}. Its code cannot be changed. Convert the model before you script or trace it.")
        if "ReLU" in type(module).__name__ and ".ao.nn." in home:
            raise ValueError(
                f"{where}. Its ReLU is fused with a layer and cannot be replaced. Convert the model before you fuse it."
            )
        if home.startswith(_QUANTISED) and not type(module).__name__.endswith(_NOT_QUANTISED):
            raise ValueError(
                f"{where}. It produces quantised tensors, which an activation of the family does not support. Convert "
                "the model before you quantise it."
            )
        if spec.learnable and getattr(getattr(module, "_hf_hook", None), "offload", False):
            raise ValueError(
                f"the weights of {path or 'the model'} are offloaded. New parameters cannot be added there. Convert "
                "the model before you dispatch it."
            )
    return spec


def _check_choice_of_eps(spec: GemSpec, eps: float | str | None, data: Any, per_layer: bool, c: float) -> None:
    """Checks the arguments that decide how eps is chosen."""
    chooses = isinstance(eps, str)
    if chooses and eps not in ("fit", "match"):
        raise ValueError(f"got eps={shown(eps)}. eps must be a number, 'fit' or 'match'. Write for example eps=1e-4.")
    if chooses and data is None:
        raise ValueError(
            f"got eps={eps!r} without data. It needs batches to run the model on. Pass data=; a few dozen examples are "
            "enough."
        )
    if eps == "match":
        check_match(spec, c)
    if per_layer and not chooses:
        raise ValueError(
            f"got per_layer=True with eps={shown(eps)}. per_layer needs an eps that is chosen from data. Set eps='fit' "
            "or eps='match'."
        )
    if c != MATCH_C and eps != "match":
        raise ValueError(f"got c={shown(c)} with eps={shown(eps)}. c is only used by eps='match'. Leave out c.")


def check_wrappers(model: nn.Module, spec: GemSpec, chosen: dict[str, Slot]) -> None:
    """Raises ValueError if a wrapper tracks the parameters, and the conversion adds an eps or removes a PReLU's."""
    going = [path for path, slot in chosen.items() if _has_weights(slot)]
    if not spec.learnable and not going:
        return
    for path, module in model.named_modules():
        if {cls.__name__ for cls in type(module).__mro__} & _WRAPPERS:
            what = "would not see the new parameters" if spec.learnable else f"needs the parameters of {going[0]}"
            raise ValueError(
                f"{path or 'the model'} is a {type(module).__module__}.{type(module).__name__}. This wrapper {what}. "
                "Convert the model before you wrap it."
            )


def check_containers(spec: GemSpec, chosen: dict[str, Slot]) -> None:
    """Raises ValueError if a learnable activation would have to be a submodule where it must not be one."""
    for path, slot in chosen.items():
        if spec.learnable and slot.key in vars(slot.owner) and (reason := no_submodule(slot.owner)) is not None:
            raise ValueError(
                f"got the learnable {spec.name} for {path}, an attribute of a {type(slot.owner).__name__}. Its eps is "
                f"only trained if the activation is a submodule. But {reason}. Use a fixed eps, or exclude it with "
                f"skip={path!r}."
            )


def _has_weights(slot: Slot) -> bool:
    return isinstance(slot.occupant, nn.Module) and any(True for _ in slot.occupant.parameters())
