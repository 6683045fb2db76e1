"""Conversions in the configs of transformers models: how they get there, and what a converted config selects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from ..family.names import GemSpec, is_claimed, parse
from .fields import activation_fields, declares, nested_configs, plain_name
from .plans import PLAN, check_plan, parts_inside, parts_of, plan_of, specs


def own_config(model: Any) -> None:
    """Gives a model a config of its own, for its plan not to reach the next model built from the same object."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def write_plan(model: Any) -> None:
    """Writes the conversion of a transformers model into its config, or takes it out where there is none.

    A part built from a config inside the config, such as a vision tower, has its own there, for it to be loaded alone.
    """
    inner = {id(config): (prefix, config) for prefix, config in nested_configs(model.config).items()}
    parts = {path: part for path, part in parts_of(model).items() if id(part.config) in inner}
    for _, config in inner.values():
        vars(config).pop(PLAN, None)
        if is_claimed(vars(config).get("hidden_act")) and not declares(config, "hidden_act"):
            del config.hidden_act  # it had no effect, and what was asked with it may be done now
    for path, part in parts.items():
        plan = plan_of(part, parts_inside(parts, path))
        if plan is None:
            continue
        owned = {id(other.config) for other in parts.values() if other is not part}
        used = specs(part)
        elsewhere = tuple(prefix for prefix, config in nested_configs(part.config).items() if id(config) in owned)
        part.config.hf_gem = {
            **plan,
            "fields": {
                field.path: field.value
                for field in activation_fields(part.config)
                if field.is_body and not field.path.startswith(elsewhere) and not _names_one_of(field.value, used)
            },
        }


def _names_one_of(value: str, used: set[GemSpec]) -> bool:
    value = plain_name(value)
    return is_claimed(value) and parse(value) in used


def write_plan_of_diffusers(model: Any) -> None:
    """Writes the conversion of a model of diffusers into its config, or takes it out where there is none."""
    config = {key: value for key, value in model._internal_dict.items() if key != PLAN}
    if (plan := plan_of(model)) is not None:
        config[PLAN] = plan
    model._internal_dict = type(model._internal_dict)(config)


# In memory a converted config selects what its model is built from, before the plan is applied. Saved, it selects a
# name of the plan instead (the first in the alphabet), so that transformers alone stops at a name it does not know,
# where it would have loaded another function. The parts of a composite model keep plans in their own configs, which
# they may be loaded from alone.


def mask(config: Any) -> None:
    """Makes a converted config, or what is converted in it, select its converted name where its class allows that."""
    for part, plan in _plans(config):
        for field in activation_fields(part):
            old = field.value
            if old == plan["fields"].get(field.path):
                try:
                    field.set(min(plan["activations"]))
                    getattr(part, "validate", lambda: None)()
                except Exception:  # huggingface_hub's validation: this field is for some values only
                    field.set(old)


def unmask(config: Any) -> None:
    """Makes a converted config, or what is converted in it, select again what its model is built from.

    Raises:
        ValueError: an activation was set since it was saved, which the conversion would replace.
    """
    for part, plan in _plans(config):
        name = min(plan["activations"])
        stock = [(field, plan["fields"].get(field.path, field.value)) for field in activation_fields(part)]
        for field, value in stock:
            if plain_name(field.value) != name and field.value != value:
                raise ValueError(
                    f"{type(part).__name__} got {field.path}={field.value!r} for a model that was converted to "
                    f"{name!r}; remove the conversion first with `del config.{PLAN}`, or convert the model after it is "
                    "built"
                )
        for field, value in stock:  # one may set another, which comes after it
            field.set(value)


def _plans(config: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    for part in nested_configs(config).values():
        if (plan := vars(part).get(PLAN)) is not None:
            check_plan(plan)
            yield part, plan
