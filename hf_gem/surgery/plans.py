"""Conversions as data: modules of the family in place of a model's own activations, written down, replayed, undone.

A conversion lives in the model: every module that stands in for something else keeps it. Its plan, what a config can
hold, is read off the model, with what was put into it by hand:

    {"version": 1, "model": "ResNetModel", "base": "", "parts": ["embedder", "encoder", "pooler"],
     "activations": {"gem_n2": ["embedder.embedder.activation", ...]}, "fields": {"hidden_act": "relu"}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..family.names import GemSpec, is_claimed, parse

PLAN = "hf_gem"  # the key of a plan in a config
BUILT = "_hf_gem_built"  # an attribute of the activations that come with their model when it is built again
_VERSION = 1
_PACKED = "used_nested_tensor"  # an attribute; see `match_nested_tensors`
_HALF_HARD_CODED = {"hgnet_v2", "resnet", "rt_detr_resnet", "uvdoc"}  # model types; see `complete`


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


def join(path: str, key: str) -> str:
    """The dotted path of `key` in the module at `path`; with `""`, what all paths in it start with."""
    return f"{path}.{key}" if path else key


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
            else:
                vars(new)[BUILT] = True
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
                yield Slot(join(path, key), module, key)


def added(model: nn.Module) -> Iterator[Slot]:
    """The slots with an activation of the family that does not come with the model: converted, or put in by hand."""
    for path, module in model.named_modules():
        for key, child in module._modules.items():
            # Duck typing: in a checkpoint this file stands beside another class of activations.
            if isinstance(getattr(child, "spec", None), GemSpec) and BUILT not in vars(child):
                yield Slot(join(path, key), module, key)


def unnamed(model: nn.Module) -> str | None:
    """What is wrong with saving a model by the names of its activations; None where nothing is."""
    for slot in added(model):
        module: Any = slot.occupant
        if module.num_parameters != 1:
            return (
                f"{slot.path} has num_parameters={module.num_parameters}, which no config can hold: it names an eps "
                "for the whole layer only, and what is saved by it cannot be loaded. Set num_parameters=1, or keep "
                "model.state_dict(), or let a class of your own build the activation, before its self.post_init()"
            )
    return None


def undo(model: nn.Module) -> list[str]:
    """Puts back what conversions replaced, and returns the paths."""
    slots = list(converted(model))
    for slot in slots:
        module: Any = slot.occupant
        old = module.replaces[0]
        slot.put(old.train(module.training) if isinstance(old, nn.Module) else old)
    match_nested_tensors(model)
    return [slot.path for slot in slots]


def plan_of(model: nn.Module, without: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The conversion of a model, and what was put in by hand, as JSON values, or None where there is none.

    Args:
        model: The model.
        without: What the paths in parts start with that keep a plan of their own, as `parts_inside` gives it.
    """
    activations: dict[str, list[str]] = {}
    for slot in added(model):
        if not slot.path.startswith(without):
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
        "parts": [name for name, _ in (getattr(model, prefix) if has_head else model).named_children()],
        "activations": activations,
        "fields": {},  # see integrations/fields.py; timm has none
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
                Slot(join(p, k), o, k) for p, o in owners for k, child in o._modules.items() if type(child) is nn.ReLU
            ]
            replace(part, {parse(name).name: left}, make, written_down=False)


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Path -> part: the outermost one that was built from each transformers config in a model; outer ones first."""
    parts: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_model_prefix") and hasattr(module, "config"):
            parts.setdefault(id(module.config), (path, module))
    return dict(parts.values())


def parts_inside(parts: dict[str, Any], path: str) -> tuple[str, ...]:
    """What paths in the other parts inside the one at `path` start with, seen from there."""
    start = join(path, "")
    return tuple(join(other.removeprefix(start), "") for other in parts if other.startswith(start) and other != path)


def apply_plans(model: nn.Module, make: Callable[[str], nn.Module], unfinished: bool = False) -> dict[str, str]:
    """Replays the conversions in the configs of a transformers model and its parts; see `apply_plan`."""
    missing: dict[str, str] = {}
    applied: list[tuple[str, Any]] = []
    for path, part in parts_of(model).items():
        plan = vars(part.config).get(PLAN)
        if plan is None or any(path.startswith(outer) and plan == theirs for outer, theirs in applied):
            continue  # T5's stacks are built from copies of its config
        start = join(path, "")
        missing |= {start + left: name for left, name in apply_plan(plan, part, make, unfinished).items()}
        applied.append((start, plan))
    return missing


def check_plan(given: Any) -> None:
    """Raises ValueError, saying what to do, where this is no plan or one of another version."""
    plan: dict[str, Any] = given if isinstance(given, dict) else {}
    shape = {"model": str, "base": str, "parts": list, "activations": dict, "fields": dict}
    well_formed = all(isinstance(plan.get(key), kind) for key, kind in shape.items()) and plan["activations"]
    if not well_formed or plan.get("version") != _VERSION:
        raise ValueError(
            f"cannot read the conversion in this config, {PLAN}={str(given)[:200]}: this hf_gem reads version "
            f"{_VERSION}; upgrade hf_gem, or remove the key to load the model unconverted"
        )
    for name in plan["activations"]:
        parse(name)


def apply_plan(
    plan: dict[str, Any], model: nn.Module, make: Callable[[str], nn.Module], unfinished: bool = False
) -> dict[str, str]:
    """Replays a conversion on a freshly built model, before its weights are loaded.

    A transformers model is also found in another class of its family: the path `resnet.encoder.x` of a model with a
    head is `encoder.x` of the bare one, and the other way round; what is in the head of another class is left out where
    this one has nothing at that path, and so are whole parts that it does not have.

    Args:
        plan: As `plan_of` gives it.
        model: The model, in its original state or converted already.
        make: Builds the module for a name.
        unfinished: Whether parts of the model may still be to come, so that what is not found is left out.

    Returns:
        What was left out: path -> name.

    Raises:
        ValueError: the plan is of another version or malformed, or the model lacks what was replaced. Nothing is
            changed then.
    """
    check_plan(plan)
    same_class = plan["model"] == type(model).__name__
    theirs = f"{plan['base']}." if plan["base"] and not same_class else ""
    prefix = getattr(model, "base_model_prefix", "")
    ours = f"{prefix}." if prefix and hasattr(model, prefix) and not same_class else ""
    parts = {name for name, _ in model.get_submodule(ours.rstrip(".")).named_children()}
    is_excerpt = not same_class and parts < set(plan["parts"])  # T5EncoderModel has no decoder

    slots: dict[str, list[Slot]] = {}
    missing = {}
    for name, paths in plan["activations"].items():
        for path in paths:
            in_head = not path.startswith(theirs)
            here = path if in_head else ours + path.removeprefix(theirs)
            try:
                slot = slot_at(model, here)
            except KeyError:
                if not in_head and not (is_excerpt and path.removeprefix(theirs).split(".")[0] not in parts):
                    missing[path] = name
                continue
            if getattr(slot.occupant, "spec", None) != parse(name):
                slots.setdefault(name, []).append(slot)
    if missing and not unfinished:
        path, name = next(iter(missing.items()))
        raise ValueError(
            f"{type(model).__name__} has no activation at {path!r}, which {plan['model']} had when it was converted to "
            f"{name!r}: it was built by other code. Convert the original model again, or remove the key {PLAN!r} from "
            "its config to load it unconverted"
        )
    replace(model, slots, make)
    return missing
