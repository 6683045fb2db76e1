"""Conversions as data: modules of the family in place of a model's own activations, written down, replayed, undone.

A conversion lives in the model: every module that stands in for something else keeps it. Its plan, what a config can
hold, is read off the model:

    {"version": 1, "model": "ResNetModel", "base": "", "activations": {"gem_n2": ["embedder.embedder.activation", ...]}}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .spec import is_claimed, parse

PLAN = "hf_gem"  # the key of a plan in a config
_VERSION = 1
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
            kinds = {nn.functional.relu: 1, nn.functional.gelu: 2, nn.ReLU: 1, nn.GELU: 2}
            kind = type(occupant) if isinstance(occupant, nn.Module) else occupant
            self.owner.activation_relu_or_gelu = kinds.get(kind, 0)


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


def replace(slots: dict[str, list[Slot]], make: Callable[[str], nn.Module], written_down: bool = True) -> None:
    """Puts the named activations into slots; what shares a module goes on sharing one, unless it is learnable.

    A learnable one is made beside the weights of its neighbours, on their device and in their dtype.

    Args:
        slots: Name of the family -> slots.
        make: Builds the module for a name.
        written_down: Whether this belongs to the plan of the model and can be undone.
    """
    made: dict[tuple[int, str], nn.Module] = {}
    for name, places in slots.items():
        learnable = parse(name).learnable
        for slot in places:
            old = slot.occupant
            new = made.get((id(old), name)) or make(name)
            if learnable:
                new.to(**_like_neighbours(slot.owner))
            else:
                made[id(old), name] = new
            if written_down:
                # In a tuple, which hides it from the model; the first one, where a conversion is converted.
                vars(new)["replaces"] = getattr(old, "replaces", (old,))
            new.train(slot.owner.training)
            slot.put(new)


def _like_neighbours(owner: nn.Module) -> dict[str, Any]:
    for tensor in owner.parameters():
        if tensor.is_floating_point():
            return {"device": tensor.device, "dtype": tensor.dtype}
    return {}


def converted(model: nn.Module) -> Iterator[Slot]:
    """The slots whose module stands in for something else."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, child in module._modules.items():
            if child is not None and "replaces" in vars(child):
                yield Slot(f"{path}.{key}".lstrip("."), module, key)


def undo(model: nn.Module) -> list[str]:
    """Puts back what conversions replaced, and returns the paths."""
    slots = list(converted(model))
    for slot in slots:
        slot.put(slot.occupant.replaces[0])  # type: ignore[attr-defined]
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
                Slot(f"{p}.{k}", o, k) for p, o in owners for k, child in o._modules.items() if type(child) is nn.ReLU
            ]
            replace({parse(name).name: left}, make, written_down=False)


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
    replace(slots, make)
