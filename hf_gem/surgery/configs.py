"""Stores conversions in the configs of transformers models, and controls which activation such a config selects."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..family.names import GemSpec, parse
from ..files import shown
from .fields import activation_fields, declares, is_ours, nested_configs, plain_name, validate
from .plans import PLAN, check_form, check_plan, parts_inside, parts_of, plan_of, specs


def own_config(model: Any, root: nn.Module) -> None:
    """Gives a model its own copy of its config, so that its plan does not affect other models built from it.

    Every module of `root`, which contains the model, that holds one of its configs gets the copy.
    """
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in root.modules():
        config = vars(module).get("config")
        if id(config) in copies:
            module.config = copies[id(config)]


def write_plan(model: Any) -> None:
    """Writes the conversion of a transformers model into its config, or removes it if there is none.

    A part built from a sub-config, such as a vision tower, has its own plan there, so that it can be loaded alone.
    """
    parts = parts_of(model)
    configs = _configs_of(parts, model.config)
    parts = {path: parts[path] for path in configs}
    for config in nested_configs(model.config).values():
        vars(config).pop(PLAN, None)
        if is_ours(vars(config).get("hidden_act")) and not declares(config, "hidden_act"):
            del config.hidden_act  # undeclared, so it had no effect; the conversion may now do what it asked for
    for path, part in parts.items():
        plan = plan_of(part, parts_inside(parts, path))
        if plan is None:
            continue
        owned = {id(config) for other, config in configs.items() if other != path}
        used = specs(part)
        elsewhere = tuple(prefix for prefix, config in nested_configs(configs[path]).items() if id(config) in owned)
        configs[path].hf_gem = {
            **plan,
            "fields": {
                field.path: field.value
                for field in activation_fields(configs[path])
                if field.is_body and not field.path.startswith(elsewhere) and not _names_one_of(field.value, used)
            },
        }


def _configs_of(parts: dict[str, Any], config: Any) -> dict[str, Any]:
    """Returns path -> the config of a part inside the config of the whole model. Parts without one are left out.

    A part that was converted by itself holds a copy of its config. The original is then the only one of its class that
    no part holds.
    """
    inner = {id(one): one for one in nested_configs(config).values()}
    taken = {id(part.config) for part in parts.values()}
    found = {}
    for path, part in parts.items():
        homes = [one for key, one in inner.items() if key not in taken and type(one) is type(part.config)]
        if id(part.config) in inner:
            found[path] = part.config
        elif len(homes) == 1:
            found[path] = homes[0]
            taken.add(id(homes[0]))
    return found


def _names_one_of(value: str, used: set[GemSpec]) -> bool:
    value = plain_name(value)
    return is_ours(value) and parse(value) in used


def write_plan_of_diffusers(model: Any) -> None:
    """Writes the conversion of a diffusers model into its config, or removes it if there is none."""
    config = {key: value for key, value in model._internal_dict.items() if key != PLAN}
    if (plan := plan_of(model)) is not None:
        config[PLAN] = plan
    model._internal_dict = type(model._internal_dict)(config)


# In memory, a converted config selects the original activation: the model is built with it, then the plan is applied. A
# saved config selects a name of the plan instead (the first in alphabetical order). Without hf_gem, transformers then
# stops at this unknown name instead of silently loading another function. The parts of a composite model have plans in
# their own configs, since they may be loaded alone.


def mask(config: Any) -> None:
    """Sets the fields of a converted config, and of sub-configs, to the converted name if their class allows it."""
    for part, plan in _plans(config):
        for field in activation_fields(part):
            old = field.value
            if old == plan["fields"].get(field.path):
                try:
                    field.set(min(plan["activations"]))
                    validate(part)
                except Exception:  # validation by huggingface_hub: this field only allows some values
                    field.set(old)


def unmask(config: Any) -> None:
    """Sets the fields of a converted config, and of sub-configs, back to the original activation.

    Raises:
        ValueError: A name of the plan is of no registered family, or an activation was set after the config was saved,
            and the conversion would replace it.
    """
    for part, plan in _plans(config):
        check_plan(plan)
        name = min(plan["activations"])
        stock = [(field, plan["fields"].get(field.path, field.value)) for field in activation_fields(part)]
        for field, value in stock:
            if plain_name(field.value) != name and field.value != value:
                raise ValueError(
                    f"got {field.path}={shown(field.value)} in a {type(part).__name__} of a model that was converted "
                    f"to {name!r}. The conversion would replace that activation. Remove the conversion first with "
                    f"`del config.{PLAN}`, or call hf_gem.convert on the model after it is built."
                )
        for field, value in stock:  # setting one field may change another that comes later
            field.set(value)


def _plans(config: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    for part in nested_configs(config).values():
        if (plan := vars(part).get(PLAN)) is not None:
            check_form(plan)  # the code of a checkpoint, which registers its family, runs after its config is read
            yield part, plan
