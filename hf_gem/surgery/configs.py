"""Conversions in the configs of transformers models."""

from __future__ import annotations

import copy
from typing import Any

from ..family.names import is_claimed
from .fields import activation_fields, configs, declares
from .plans import PLAN, parts_inside, parts_of, plan_of


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
    inner = {id(config): (prefix, config) for prefix, config in configs(model.config).items()}
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
        elsewhere = tuple(prefix for prefix, config in configs(part.config).items() if id(config) in owned)
        part.config.hf_gem = {
            **plan,
            "fields": {
                field.path: field.value
                for field in activation_fields(part.config)
                if field.is_body and not is_claimed(field.value) and not field.path.startswith(elsewhere)
            },
        }
