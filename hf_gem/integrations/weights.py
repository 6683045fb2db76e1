"""Weight files that can store a conversion: `safetensors.torch.save_model` and Lightning checkpoints.

The Hub's mixin saves with `save_model` too. Such files are loaded into a model that its own code has built. Members of
the family that this model already has stay in place.
"""

from __future__ import annotations

import functools
import json
import warnings
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from torch import nn

from ..modules import get_activation
from ..surgery.plans import PLAN, apply_plan, plan_of
from ..surgery.slots import converted
from .registry import Installer, both, holding, patch


def warn_of_weights_alone(model: nn.Module, what: str) -> None:
    """Warns that a conversion is not saved, because only weights are."""
    slots = list(converted(model))
    if slots:
        module: Any = slots[0].occupant
        warnings.warn(
            f"{what} saves the weights of {type(model).__name__}, but not its conversion. Before you load them into a "
            f"new model, convert it in the same way: it has {module.spec.name!r} at {slots[0].path!r}. Otherwise it "
            "computes another function.",
            stacklevel=4,
        )


# ---- safetensors


def _save_model(
    original: Any, model: nn.Module, filename: Any, metadata: dict[str, str] | None = None, *args: Any, **kwargs: Any
) -> None:
    plan = plan_of(model, built=True)
    if plan is not None:
        metadata = {**(metadata or {}), PLAN: json.dumps(plan)}
    original(model, filename, metadata, *args, **kwargs)


def _load_model(original: Any, model: nn.Module, filename: Any, *args: Any, **kwargs: Any) -> Any:
    from safetensors import safe_open

    with safe_open(filename, framework="pt") as file:
        written = (file.metadata() or {}).get(PLAN)
    if written is not None:
        try:
            plan = json.loads(written)
        except (ValueError, RecursionError):
            plan = written  # not a plan, so `apply_plan` raises an error
        apply_plan(plan, model, get_activation, keep="the file")
    return original(model, filename, *args, **kwargs)


# ---- Lightning

_checkpoint: ContextVar[dict[str, Any] | None] = ContextVar("hf_gem_lightning_checkpoint", default=None)


def _dump(original: Any, connector: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    checkpoint: dict[str, Any] = original(connector, *args, **kwargs)
    plan = plan_of(connector.trainer.lightning_module, built=True)
    if plan is not None:
        checkpoint[PLAN] = plan
    return checkpoint


def _load_state(original: Any, cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    with holding(_checkpoint, checkpoint):
        return original(cls, checkpoint, *args, **kwargs)


def _restore(original: Any, connector: Any, *args: Any, **kwargs: Any) -> Any:
    with holding(_checkpoint, connector._loaded_checkpoint):
        return original(connector, *args, **kwargs)


def _load_state_dict(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
    """Restores a conversion in LightningModule's `load_state_dict`, after building and before loading the weights."""
    plan = (_checkpoint.get() or {}).get(PLAN)
    if plan is not None:
        _checkpoint.set(None)
        apply_plan(plan, model, get_activation, keep="the checkpoint")
    return nn.Module.load_state_dict(model, state_dict, *args, **kwargs)


def _install_loading(module: Any) -> None:
    if "load_state_dict" not in vars(module.LightningModule):
        module.LightningModule.load_state_dict = _load_state_dict


def _uninstall_loading(module: ModuleType) -> None:
    if vars(module.LightningModule).get("load_state_dict") is _load_state_dict:
        del module.LightningModule.load_state_dict


_lightning = functools.partial(patch, lost="Lightning checkpoints do not store conversions")

INSTALLERS: dict[str, Installer] = {
    "safetensors.torch": both(
        patch("save_model", _save_model, lost="`save_model` does not store conversions"),
        patch("load_model", _load_model, lost="`load_model` does not restore conversions"),
    ),
}
for _package in ("lightning.pytorch", "pytorch_lightning"):
    INSTALLERS |= {
        f"{_package}.core.module": (_install_loading, _uninstall_loading),
        f"{_package}.core.saving": _lightning("_load_state", _load_state),
        f"{_package}.trainer.connectors.checkpoint_connector": both(
            _lightning("_CheckpointConnector.dump_checkpoint", _dump),
            _lightning("_CheckpointConnector.restore_model", _restore),
        ),
    }
