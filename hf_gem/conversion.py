"""Conversions as data: modules of the family in place of a model's own activations, written down, replayed, undone.

A conversion lives in the model: every module that stands in for something else keeps it. Its plan, what a config can
hold, is read off the model:

    {"version": 1, "model": "ResNetModel", "base": "", "activations": {"gem_n2": ["embedder.embedder.activation", ...]}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .spec import is_claimed, parse

PLAN = "hf_gem"  # the key of a plan in a config
_VERSION = 1
_PACKED = "used_nested_tensor"  # an attribute; see `match_nested_tensors`
_HALF_HARD_CODED = {"resnet", "rt_detr_resnet"}  # model types; see `complete`


@dataclass(frozen=True)
class Slot:
    """A place that holds an activation: attribute `key` of the module `owner`, a submodule or a plain function."""

    path: str
    owner: nn.Module
    key: str

    @property
    def occupant(self) -> Callable[..., Any]:
        """What is there now.

        Raises:
            KeyError: nothing that can be called.
        """
        found = self.owner._modules.get(self.key) or vars(self.owner).get(self.key)
        if not callable(found):
            raise KeyError(self.path)
        return found

    def put(self, occupant: Callable[..., Any]) -> None:
        """Puts another module or function there."""
        if isinstance(occupant, nn.Module):
            setattr(self.owner, self.key, occupant)
        else:
            self.owner._modules.pop(self.key, None)
            vars(self.owner)[self.key] = occupant
        if isinstance(self.owner, nn.TransformerEncoderLayer) and self.key == "activation":
            # Its inference path runs a fused kernel for the activation that this number stands for.
            relu = occupant is nn.functional.relu or isinstance(occupant, nn.ReLU)
            gelu = occupant is nn.functional.gelu or isinstance(occupant, nn.GELU)
            self.owner.activation_relu_or_gelu = 1 if relu else 2 if gelu else 0


def slot_at(model: nn.Module, path: str) -> Slot:
    """The slot with a dotted path.

    Raises:
        KeyError: there is no such module, or nothing in it that can be called.
    """
    owner, _, key = path.rpartition(".")
    try:
        slot = Slot(path, model.get_submodule(owner), key)
    except AttributeError:
        raise KeyError(path) from None
    slot.occupant  # noqa: B018  # raises
    return slot


def replace(
    model: nn.Module, slots: dict[str, list[Slot]], make: Callable[[str], nn.Module], written_down: bool = True
) -> None:
    """Puts the named activations into slots; what shares a module goes on sharing one, unless it is learnable.

    A learnable one is made beside the weights of its neighbours, on their device and in their dtype.

    Args:
        model: The model from which the paths of the slots start.
        slots: Name of the family -> slots.
        make: Builds the module for a name.
        written_down: Whether this belongs to the plan of the model and can be undone.
    """
    made: dict[tuple[int, str], nn.Module] = {}
    ready = []
    for name, places in slots.items():
        learnable = parse(name).learnable
        for slot in places:
            old = slot.occupant
            # Functions are shared by everyone who imports them, which says nothing about this model.
            distinct = learnable or not isinstance(old, nn.Module)
            new = None if distinct else made.get((id(old), name))
            if new is None:
                new = made[id(old), name] = _make(make, name, _neighbour(model, slot.path) if learnable else None)
            if written_down:
                # In a tuple, which hides it from the model; the first one, where a conversion is converted.
                vars(new)["replaces"] = getattr(old, "replaces", (old,))
            ready.append((slot, new.train(slot.owner.training)))
    for slot, new in ready:
        slot.put(new)
    match_nested_tensors(model)


def _neighbour(model: nn.Module, path: str) -> Tensor | None:
    """A weight of the innermost module around a path that has any."""
    while path:
        path = path.rpartition(".")[0]
        for tensor in model.get_submodule(path).parameters():
            if tensor.is_floating_point() and tensor.itemsize > 1:  # not one in float8
                return tensor
    return None


def _make(make: Callable[[str], nn.Module], name: str, neighbour: Tensor | None) -> nn.Module:
    with torch.inference_mode(False):  # in which no parameter is made that can be trained
        if neighbour is None:
            return make(name)
        with neighbour.device:
            return make(name).to(neighbour.dtype)


def match_nested_tensors(model: nn.Module) -> None:
    """Lets torch's encoders pack padded batches only where all their layers run the fused kernel that understands it.

    They decide that when they are built; a layer whose activation has changed since would get the packed tensors.
    """
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            fused = all(getattr(layer, "activation_relu_or_gelu", 0) for layer in encoder.layers)
            if not fused and getattr(encoder, "use_nested_tensor", False):
                encoder.use_nested_tensor = False
                vars(encoder)[_PACKED] = True
            elif fused and vars(encoder).pop(_PACKED, False):
                encoder.use_nested_tensor = True


def converted(model: nn.Module) -> Iterator[Slot]:
    """The slots whose module stands in for something else; one in a module that is there twice, once."""
    for path, module in model.named_modules():
        for key, child in module._modules.items():
            if child is not None and "replaces" in vars(child):
                yield Slot(f"{path}.{key}".lstrip("."), module, key)


def undo(model: nn.Module) -> list[str]:
    """Puts back what conversions replaced, and returns the paths."""
    slots = list(converted(model))
    for slot in slots:
        module: Any = slot.occupant
        old = module.replaces[0]
        slot.put(old.train(module.training) if isinstance(old, nn.Module) else old)
    match_nested_tensors(model)
    return [slot.path for slot in slots]


def plan_of(model: nn.Module) -> dict[str, Any] | None:
    """The conversion of a model as JSON values, or None where there is none."""
    activations: dict[str, list[str]] = {}
    for slot in converted(model):
        module: Any = slot.occupant
        activations.setdefault(module.spec.name, []).append(slot.path)
    if not activations:
        return None
    prefix = getattr(model, "base_model_prefix", "")
    has_head = bool(prefix) and hasattr(model, prefix)
    return {
        "version": _VERSION,
        "model": type(model).__name__,
        "base": prefix if has_head else "",
        "activations": activations,
    }


def complete(model: nn.Module, make: Callable[[str], nn.Module]) -> None:
    """Gives the name in `hidden_act` to the ReLUs that some packages of transformers hard-code beside those they take
    from there; this follows from the config and is not part of the plan."""
    for part in model.modules():
        config = getattr(part, "config", None)
        name = getattr(config, "hidden_act", None)
        if getattr(config, "model_type", None) in _HALF_HARD_CODED and is_claimed(name):
            owners = part.named_modules()
            left = [
                Slot(f"{p}.{k}".lstrip("."), o, k)
                for p, o in owners
                for k, child in o._modules.items()
                if type(child) is nn.ReLU
            ]
            replace(part, {parse(name).name: left}, make, written_down=False)


def apply_plan(
    plan: dict[str, Any], model: nn.Module, make: Callable[[str], nn.Module], unfinished: bool = False
) -> None:
    """Replays a conversion on a freshly built model, before its weights are loaded.

    A transformers model is also found in another class of its family: the path `resnet.encoder.x` of a model with a
    head is `encoder.x` of the bare one, which has no head, and the other way round.

    Args:
        plan: As `plan_of` gives it.
        model: The model, in its original state or converted already.
        make: Builds the module for a name.
        unfinished: Whether parts of the model may still be to come, so that what is not found is left out.

    Raises:
        ValueError: the plan is of another version or malformed, or the model lacks what was replaced. Nothing is
            changed then.
    """
    if (
        not isinstance(plan, dict)
        or plan.get("version") != _VERSION
        or not {"model", "base", "activations"} <= set(plan)
    ):
        raise ValueError(
            f"cannot read the conversion in this config, {PLAN}={str(plan)[:200]}: this hf_gem reads version "
            f"{_VERSION}; upgrade hf_gem, or remove the key to load the model unconverted"
        )
    same_class = plan["model"] == type(model).__name__
    theirs = f"{plan['base']}." if plan["base"] and not same_class else ""
    prefix = getattr(model, "base_model_prefix", "")
    ours = f"{prefix}." if prefix and hasattr(model, prefix) and not same_class else ""

    slots: dict[str, list[Slot]] = {}
    for name, places in plan["activations"].items():
        for path in places:
            if not path.startswith(theirs):
                continue  # in the head of the other class
            try:
                slot = slot_at(model, ours + path.removeprefix(theirs))
            except KeyError:
                if unfinished:
                    continue
                raise ValueError(
                    f"{type(model).__name__} has no activation at {path!r}, which {plan['model']} had when it was "
                    f"converted to {name!r}: it was built by other code. Convert the original model again, or remove "
                    f"the key {PLAN!r} from its config to load it unconverted"
                ) from None
            if getattr(slot.occupant, "spec", None) != parse(name):
                slots.setdefault(name, []).append(slot)
    replace(model, slots, make)
