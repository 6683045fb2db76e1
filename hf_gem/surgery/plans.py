"""Conversions as data: modules of the family in place of a model's own activations, written down, replayed, undone.

A conversion lives in the model: every module that stands in for something else keeps it. Its plan, what a config can
hold, is read off the model, with what was put into it by hand:

    {"version": 1, "model": "ResNetModel", "base": "", "parts": ["embedder", "encoder", "pooler"],
     "activations": {"gem_n2": ["embedder.embedder.activation", ...]}, "fields": {"hidden_act": "relu"}}
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypedDict

from torch import nn

from ..family.names import GemSpec, is_claimed, parse
from ..files import check_type
from .slots import BUILT, Slot, does_more, join, module_slots, replace, slot_at, spec_of

PLAN = "hf_gem"  # the key of a plan in a config
_VERSION = 1


class _Plan(TypedDict):
    version: Literal[1]
    model: str
    base: str
    parts: list[str]
    activations: dict[str, list[str]]
    fields: dict[str, Any]


_HALF_HARD_CODED = {"hgnet_v2", "resnet", "rt_detr_resnet", "uvdoc"}  # model types; see `complete`


def added(model: nn.Module, built: bool = False) -> Iterator[Slot]:
    """The slots with an activation of the family that does not come with the model: converted, or put in by hand.

    With `built`, those too that come with it, by its config.
    """
    for slot in module_slots(model):
        if spec_of(slot.occupant) is not None and (built or BUILT not in vars(slot.occupant)):
            yield slot


def specs(model: nn.Module, replaced: bool = False) -> set[GemSpec]:
    """The members of the family that a model has now; with `replaced`, those too that a conversion has replaced."""
    modules = list(model.modules())
    if replaced:
        modules += [old for module in modules for old in vars(module).get("replaces", ()) if isinstance(old, nn.Module)]
    return {spec for module in modules if (spec := spec_of(module)) is not None}


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
        for old in vars(module).get("replaces", ()):
            if does_more(old):
                return (
                    f"{slot.path} has replaced a {type(old).__name__}, which is a layer, or has weights or parts that "
                    "are: what is saved cannot be loaded, since a config replaces activations only. Keep "
                    "model.state_dict(), or let a class of your own build the activation, before its self.post_init()"
                )
    return shared_eps(model)


def shared_eps(model: nn.Module) -> str | None:
    """What is wrong with one learnable activation in several places, which files do not hold; None where none is."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        eps = dict(module.named_parameters(recurse=False)).get("log_ratio")  # not what PEFT's wrappers pass on
        if spec_of(module) is not None and eps is not None:
            places.setdefault(id(eps), []).append(path)
    for paths in places.values():
        if len(paths) > 1:
            return (
                f"one learnable eps is shared by {paths[0]!r} and {paths[1]!r}"
                f"{f' and {len(paths) - 2} more' if paths[2:] else ''}, and files of weights hold each tensor once: "
                "saving fails, or takes them apart. Give each layer its own before training, by "
                "copy.deepcopy(activation) or hf_gem.convert"
            )
    return None


def plan_of(model: nn.Module, without: tuple[str, ...] = (), built: bool = False) -> dict[str, Any] | None:
    """The conversion of a model, and what was put in by hand, as JSON values, or None where there is none.

    Args:
        model: The model.
        without: What the paths in parts start with that keep a plan of their own, as `parts_inside` gives it.
        built: Whether what comes with the model by its config is in the plan too, for what is loaded into a model of
            another config.
    """
    activations: dict[str, list[str]] = {}
    for slot in added(model, built):
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
        "fields": {},  # see configs.py; timm has none
    }


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


def check_plan(given: Any) -> None:
    """Raises ValueError, saying what to do, where this is no plan or one of another version."""
    try:
        check_type(given, _Plan, PLAN)
        if not given["activations"]:
            raise ValueError("it names no activation")
    except ValueError as error:
        raise ValueError(
            f"cannot read the conversion in this config, {PLAN}={reprlib.repr(given)} ({error}): this hf_gem reads "
            f"version {_VERSION}; upgrade hf_gem, or remove the key to load the model unconverted"
        ) from None
    for name in given["activations"]:
        parse(name)


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


def apply_plan(
    plan: dict[str, Any],
    model: nn.Module,
    make: Callable[[str], nn.Module],
    unfinished: bool = False,
    keep: str = "",
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
        keep: What comes with the plan, such as an adapter, where a member of the family that the model has already
            stays, and a warning says that it is another one.

    Returns:
        What was left out: path -> name.

    Raises:
        ValueError: the plan is of another version or malformed, the model lacks what was replaced, or has something
            there that is more than an activation. Nothing is changed then.
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
    kept = []
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
            _require_activation(slot.occupant, path, name)
            spec, present = parse(name), spec_of(slot.occupant)
            if keep and present is not None and present != spec:
                kept.append(f"{present.name!r} at {here!r}, where {keep} had {name!r}")
            elif present != spec:
                slots.setdefault(name, []).append(slot)
    if missing and not unfinished:
        path, name = next(iter(missing.items()))
        raise ValueError(
            f"{type(model).__name__} has no activation at {path!r:.80}, which {plan['model']:.80} had when it was "
            f"converted to {name!r}: it was built by other code. Convert the original model again, or remove the key "
            f"{PLAN!r} from its config to load it unconverted"
        )
    replace(model, slots, make)
    if kept:
        _say_what_stays(model, kept)
    return missing


def _require_activation(occupant: Any, path: str, name: str) -> None:
    if does_more(occupant):
        raise ValueError(
            f"the conversion in this config puts {name!r} in the place of {path!r}, a {type(occupant).__name__}, "
            "which is a layer, or has weights or parts that are. Conversions replace activations only; remove the key "
            f"{PLAN!r} from the config to load the model unconverted"
        )


def _say_what_stays(model: nn.Module, kept: list[str]) -> None:
    warnings.warn(
        f"{type(model).__name__} keeps {kept[0]}{f', and {len(kept) - 1} more' if kept[1:] else ''}: it computes "
        "another function than what was saved; build it with the same activations, or revert their conversion",
        stacklevel=4,
    )


def complete(model: nn.Module, make: Callable[[str], nn.Module]) -> None:
    """Gives the name in `hidden_act` to the ReLUs that some packages of transformers hard-code beside those they take
    from there; this follows from the config and is not part of the plan."""
    for part in model.modules():
        config = getattr(part, "config", None)
        name = getattr(config, "hidden_act", None)
        if getattr(config, "model_type", None) in _HALF_HARD_CODED and is_claimed(name):
            left = [slot for slot in module_slots(part) if type(slot.occupant) is nn.ReLU]
            replace(part, {parse(name).name: left}, make, written_down=False)
