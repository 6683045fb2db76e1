"""diffusers: the config of a model stores its conversion, and building a model from the config restores it."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modules import get_activation
from ..surgery.configs import write_plan_of_diffusers
from ..surgery.plans import PLAN, apply_plan
from .registry import Installer, both, patch


def _from_config(original: Any, cls: Any, config: Any = None, *args: Any, **kwargs: Any) -> Any:
    plan = config.get(PLAN) if isinstance(config, dict) else None
    if plan is None:
        return original(cls, config, *args, **kwargs)
    # Without the key, since diffusers warns about keys that are not arguments of the class.
    result = original(cls, {key: value for key, value in config.items() if key != PLAN}, *args, **kwargs)
    model = result[0] if isinstance(result, tuple) else result
    if isinstance(model, nn.Module):
        apply_plan(plan, model, get_activation)
        write_plan_of_diffusers(model)
    return result


def _save_config(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(model, nn.Module):  # schedulers are saved in the same way
        write_plan_of_diffusers(model)
    return original(model, *args, **kwargs)


_LOST = "conversions of its models are not saved"

INSTALLERS: dict[str, Installer] = {
    "diffusers.configuration_utils": both(
        patch("ConfigMixin.from_config", _from_config, _LOST), patch("ConfigMixin.save_config", _save_config, _LOST)
    )
}
