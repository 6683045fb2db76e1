"""Plans: conversions as data that a config can hold and that can be replayed on a new model.

The conversion itself is stored in the model: every module that replaced something keeps what it replaced. The plan is
read from the model, and includes activations of the family that were put in by hand:

    {"version": 1, "model": "ResNetModel", "base": "", "parts": ["embedder", "encoder", "pooler"],
     "activations": {"gem_n2": ["embedder.embedder.activation", ...]}, "left": 0, "fields": {"hidden_act": "relu"}}

`left` is the number of activations outside the family in other layers, whose paths differ from those only in indices. A
model with more layers has more of them. Plans of older versions of hf_gem lack it.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypedDict

from torch import nn

from ..family.names import GemSpec, parse
from ..files import check_type, shown
from .fields import is_ours
from .reports import counted, without_indices
from .slots import BUILT, Slot, classes, does_more, join, module_slots, named_modules, replace, slot_at, spec_of

PLAN = "hf_gem"  # the key of a plan in a config
_VERSION = 1


class _Newer(TypedDict, total=False):
    left: int


class _Plan(_Newer):
    version: Literal[1]
    model: str
    base: str
    parts: list[str]
    activations: dict[str, list[str]]
    fields: dict[str, Any]


_HALF_HARD_CODED = {"hgnet_v2", "resnet", "rt_detr_resnet", "uvdoc"}  # model types; see `complete`


def added(model: nn.Module, built: bool = False) -> Iterator[Slot]:
    """Yields the slots whose activation of the family was put in or changed after the model was built.

    With `built`, activations that the config selects are included.
    """
    for slot in module_slots(model):
        spec = spec_of(slot.occupant)
        if spec is not None and (built or vars(slot.occupant).get(BUILT) != spec.name):
            yield slot


def specs(model: nn.Module, replaced: bool = False) -> set[GemSpec]:
    """Returns the members of the family in a model. With `replaced`, includes members that a conversion replaced."""
    modules = [module for _, module in named_modules(model)]
    if replaced:
        modules += [old for module in modules for old in vars(module).get("replaces", ()) if isinstance(old, nn.Module)]
    return {spec for module in modules if (spec := spec_of(module)) is not None}


def unnamed(model: nn.Module) -> str | None:
    """Returns the reason why a model cannot be saved by the names of its activations, or None if it can."""
    for slot in added(model):
        module: Any = slot.occupant
        if _has_its_own_forward(module):
            return (
                f"{slot.path} is a {type(module).__name__}, whose forward is not that of {module.spec.name}. A config "
                "can only store the name, so the saved model would compute another function. Register your function "
                "with hf_gem.register_family, or build it in your own model class, before self.post_init()."
            )
        if module.num_parameters != 1:
            return (
                f"{slot.path} has num_parameters={module.num_parameters}. A config can only store one eps per layer, "
                "so the saved model could not be loaded. Set num_parameters=1, save model.state_dict() yourself, or "
                "build the activation in your own model class, before self.post_init()."
            )
        for old in vars(module).get("replaces", ()):
            if does_more(old):
                return (
                    f"{slot.path} replaced a {type(old).__name__}, which is a layer or contains one. A config can only "
                    "store replaced activations, so the saved model could not be loaded. Save model.state_dict() "
                    "yourself, or build the activation in your own model class, before self.post_init()."
                )
    return shared_eps(model)


def _has_its_own_forward(module: nn.Module) -> bool:
    """Returns whether a user's class, derived from one of the family, overrides its forward."""
    return sum("forward" in vars(cls) for cls in classes(module)) > 1


def shared_eps(model: nn.Module) -> str | None:
    """Returns the reason why a learnable eps in several places cannot be saved, or None if no eps is shared."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        eps = dict(module.named_parameters(recurse=False)).get("log_ratio")  # not one that a PEFT wrapper forwards
        if spec_of(module) is not None and eps is not None:
            places.setdefault(id(eps), []).append(path)
    for paths in places.values():
        if len(paths) > 1:
            return (
                f"{paths[0]!r} and {paths[1]!r}{f' and {len(paths) - 2} more' if paths[2:] else ''} share one "
                "learnable eps. Weight files store each tensor once, so saving fails, or loading gives them separate "
                "eps. Give each layer its own eps before training, with copy.deepcopy(activation) or hf_gem.convert."
            )
    return None


def plan_of(model: nn.Module, without: tuple[str, ...] = (), built: bool = False) -> dict[str, Any] | None:
    """Returns the conversion of a model as JSON values, with activations put in by hand. None if there is none.

    Args:
        model: The model.
        without: Prefixes of the parts that have a plan of their own, as `parts_inside` returns them.
        built: Whether to include activations that the config selects. Needed if the plan will be applied to a model
            with another config.
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
        "left": len(_others(model, itertools.chain(*activations.values()))),
        "fields": {},  # filled in by configs.py; timm has no such fields
    }


def _others(model: nn.Module, paths: Iterable[str]) -> dict[str, Any]:
    """Returns path -> activation for those outside the family whose paths differ from given ones only in indices."""
    patterns = set(map(without_indices, paths))
    above = {pattern.rpartition(".")[0] for pattern in patterns}
    return {
        path: held
        for start, owner in model.named_modules()
        if without_indices(start) in above
        for key, held in [*owner.named_children(), *vars(owner).items()]
        if without_indices(path := join(start, key)) in patterns and callable(held) and spec_of(held) is None
        if not isinstance(held, nn.Identity) and not does_more(held)
    }


def parts_of(model: nn.Module) -> dict[str, Any]:
    """Returns path -> part. A part is the outermost module built from a transformers config. Outer parts come first."""
    parts: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        if hasattr(module, "base_model_prefix") and hasattr(module, "config"):
            parts.setdefault(id(module.config), (path, module))
    return dict(parts.values())


def parts_inside(parts: dict[str, Any], path: str) -> tuple[str, ...]:
    """Returns the path prefixes of the parts inside the part at `path`, relative to it."""
    start = join(path, "")
    return tuple(join(other.removeprefix(start), "") for other in parts if other.startswith(start) and other != path)


def check_form(given: Any) -> None:
    """Raises ValueError if this is not a plan, or a plan of another version. Names may be of any family."""
    try:
        check_type(given, _Plan, PLAN)
        if not given["activations"]:
            raise ValueError("it names no activation")
    except ValueError as error:
        raise ValueError(
            f"cannot read the conversion in this config, {PLAN}={shown(given)}: {error}. This hf_gem reads version "
            f"{_VERSION}. Upgrade hf_gem, or remove the key to load the model unconverted."
        ) from None


def check_plan(given: Any) -> None:
    """Raises ValueError if this is not a plan, or if it names a function that is not of a registered family."""
    check_form(given)
    for name in given["activations"]:
        parse(name)


def apply_plans(model: nn.Module, make: Callable[[str], nn.Module], unfinished: bool = False) -> dict[str, str]:
    """Replays the conversions stored in the configs of a transformers model and its parts; see `apply_plan`."""
    missing: dict[str, str] = {}
    applied: list[tuple[str, Any]] = []
    for path, part in parts_of(model).items():
        plan = vars(part.config).get(PLAN)
        if plan is None or any(path.startswith(outer) and plan == theirs for outer, theirs in applied):
            continue  # T5 builds its stacks from copies of its config
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
    """Replays a conversion on a newly built model, before its weights are loaded.

    The plan also works for another class of the same transformers model: the path `resnet.encoder.x` of a model with a
    head is `encoder.x` in the bare model, and the other way round. Activations in the head of another class are skipped
    if this model has nothing at that path, and so are parts that this model does not have.

    Args:
        plan: Plan as returned by `plan_of`.
        model: The model, either unconverted or already converted.
        make: Function that builds the module for a name.
        unfinished: Whether parts of the model may not have been built yet. Paths that are not found are then skipped.
        keep: Description of what the plan came with, such as an adapter. If given, members of the family that the
            model already has stay, and a warning reports those that differ from the plan.

    Returns:
        The activations that were skipped: path -> name.

    Raises:
        ValueError: The plan is malformed or of another version, the model lacks an activation of the plan, or has
            something more than an activation in its place. Nothing is changed then.
    """
    check_plan(plan)
    same_class = plan["model"] == type(model).__name__
    theirs = f"{plan['base']}." if plan["base"] and not same_class else ""
    prefix = getattr(model, "base_model_prefix", "")
    ours = f"{prefix}." if prefix and hasattr(model, prefix) and not same_class else ""
    parts = {name for name, _ in model.get_submodule(ours.rstrip(".")).named_children()}
    is_excerpt = not same_class and parts < set(plan["parts"])  # T5EncoderModel has no decoder

    slots: dict[GemSpec, list[Slot]] = {}
    missing = {}
    found, kept = [], []
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
            found.append(here)
            _require_activation(slot.occupant, path, name)
            spec, present = parse(name), spec_of(slot.occupant)
            if keep and present is not None and present != spec:
                kept.append(f"{present.name!r} at {here!r}, where {keep} had {shown(name)}")
            elif present != spec:
                slots.setdefault(spec, []).append(slot)
    if missing and not unfinished:
        raise ValueError(_lacks(plan, model, *next(iter(missing.items()))))
    replace(model, slots, make)
    if kept:
        _say_what_stays(model, kept)
    if not keep and not unfinished:
        _say_what_is_new(plan, model, found)
    return missing


def _lacks(plan: dict[str, Any], model: nn.Module, path: str, name: str) -> str:
    return (
        f"{type(model).__name__} has no activation at {shown(path)}, where the converted {plan['model']:.80} had "
        f"{shown(name)}. The plan only fits models built by the same code. Convert the original model again, or "
        f"remove the key {PLAN!r} from its config to load it unconverted."
    )


def _require_activation(occupant: Any, path: str, name: str) -> None:
    if does_more(occupant):
        raise ValueError(
            f"the conversion in this config replaces {shown(path)} with {shown(name)}, but that is a "
            f"{type(occupant).__name__}, which is a layer or contains one. Conversions can only replace activations. "
            f"Remove the key {PLAN!r} from the config to load the model unconverted."
        )


def _say_what_stays(model: nn.Module, kept: list[str]) -> None:
    warnings.warn(
        f"{type(model).__name__} keeps {kept[0]}{f', and {len(kept) - 1} more' if kept[1:] else ''}. So it does not "
        "compute the saved function. Build it with the same activations, or call hf_gem.revert first.",
        stacklevel=4,
    )


def _say_what_is_new(plan: dict[str, Any], model: nn.Module, found: list[str]) -> None:
    """Warns if the model has more layers than the converted one. Their activations are not in the plan."""
    others = _others(model, found)
    added = len(others) - plan.get("left", len(others))
    if added > 0:
        path, held = list(others.items())[-1]
        warnings.warn(
            f"{type(model).__name__} has {counted(added, 'activation')} that the converted {plan['model']:.80} did not "
            f"have, such as {getattr(held, '__name__', type(held).__name__)} at {path}, because it has more layers. "
            f"Replace them with hf_gem.convert(model, {min(plan['activations'])!r}).",
            stacklevel=4,
        )


def complete(model: nn.Module, make: Callable[[str], nn.Module]) -> None:
    """Replaces the ReLUs that some transformers models hard-code next to activations taken from `hidden_act`.

    This follows from the config, so it is not part of the plan.
    """
    for part in model.modules():
        config = getattr(part, "config", None)
        name = getattr(config, "hidden_act", None)
        if getattr(config, "model_type", None) in _HALF_HARD_CODED and is_ours(name):
            left = [slot for slot in module_slots(part) if type(slot.occupant) is nn.ReLU]
            replace(part, {parse(name): left}, make, written_down=False)
