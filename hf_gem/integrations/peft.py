"""PEFT: an adapter stores the activations that it was trained with, and applies them to the base model it is loaded on.

PEFT loads the base model by its name, and that model is not converted. So `adapter_config.json` contains the plan of
the conversion. Without hf_gem, PEFT warns about an unexpected key.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from ..modules import GemActivation, get_activation
from ..surgery.plans import PLAN, apply_plan, check_plan, plan_of
from ..surgery.slots import join
from .registry import Installer, both, holding, patch

# Whether an adapter is being loaded. Its config may also be used to train a new one, and must not convert then.
_loading: ContextVar[bool] = ContextVar("hf_gem_loading_adapter", default=False)
_COPIES = re.compile(r"\.modules_to_save\.[^.]+")  # the copy of a fully trained module, next to the original


def _outside_tuners(model: nn.Module, path: str) -> str:
    """Returns the path that a module has if no layer of an adapter holds it, as around experts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kept = []
    module = model
    for key in path.split("."):
        if not (key == "base_layer" and isinstance(module, BaseTunerLayer)):
            kept.append(key)
        module = getattr(module, key)
    return ".".join(kept)


def write_adapter_plan(model: nn.Module, configs: dict[str, Any]) -> None:
    """Writes the plan of a model's activations into the configs of its adapters."""
    plan = plan_of(model, built=True)
    if plan is not None:
        clean = {
            name: [_COPIES.sub("", _outside_tuners(model, path)) for path in paths]
            for name, paths in plan["activations"].items()
        }
        plan["activations"] = {
            name: list(dict.fromkeys(path.replace(".original_module", "") for path in paths))
            for name, paths in clean.items()
        }
    for config in configs.values():
        vars(config).pop(PLAN, None)
        if plan is not None:
            config.hf_gem = plan
    lost = [
        path
        for path, module in model.named_modules()
        if isinstance(module, GemActivation) and module.log_ratio is not None and module.log_ratio.requires_grad
        if not _COPIES.search(path)
    ]
    if plan is not None and lost:
        warnings.warn(
            f"the learnable eps at {lost[0]!r} is not part of the adapter, so loading will reset it to its initial "
            f"value. Set modules_to_save=[{lost[0].rpartition('.')[2]!r}] in the config of the adapter.",
            stacklevel=4,
        )


def _replay(model: nn.Module, config: Any) -> None:
    plan = vars(config).get(PLAN)
    if plan is not None and _loading.get():
        check_plan(plan)
        apply_plan(_in_tuners(model, plan), model, get_activation, keep="the adapter")


def _in_tuners(model: nn.Module, plan: dict[str, Any]) -> dict[str, Any]:
    """Returns a plan with the paths of this model, where layers of other adapters may hold the activations.

    In adapters from older versions of hf_gem, the paths lead through the layers of the adapter itself.
    """
    here = {_outside_tuners(model, path): path for path, _ in model.named_modules() if path}

    def place(path: str) -> str:
        owner, _, key = path.rpartition(".")
        known = owner if owner in here else owner.replace(".base_layer", "")
        return join(here.get(known, known), key)

    return {**plan, "activations": {name: [*map(place, paths)] for name, paths in plan["activations"].items()}}


# ---- configs


def _from_peft_type(original: Any, cls: Any, **kwargs: Any) -> Any:
    plan = kwargs.pop(PLAN, None)
    config = original(cls, **kwargs)
    if plan is not None:
        config.hf_gem = plan  # not a field, so that copies made from fields do not contain it
    return config


def _save_config(original: Any, config: Any, save_directory: Any, **kwargs: Any) -> None:
    original(config, save_directory, **kwargs)
    if (plan := vars(config).get(PLAN)) is not None:
        file = Path(save_directory) / "adapter_config.json"
        written = {**json.loads(file.read_text(encoding="utf-8")), PLAN: plan}
        file.write_text(json.dumps(written, indent=2, sort_keys=True), encoding="utf-8")


# ---- models


def _init(original: Any, model: Any, base: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
    _replay(base, config)
    original(model, base, config, *args, **kwargs)


def _base(model: Any) -> Any:
    """Returns the model without its adapters.

    PEFT's `get_base_model` fails without an active adapter, and the class that mixes adapters does not have it. Prompt
    learning, which that class does not support, wraps the model directly.
    """
    return model.base_model if getattr(model, "_is_prompt_learning", False) else model.base_model.model


def _add_adapter(original: Any, model: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> Any:
    _replay(_base(model), config)
    return original(model, adapter_name, config, *args, **kwargs)


def _inject(original: Any, config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    _replay(model, config)
    return original(config, model, *args, **kwargs)


def _save(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    write_adapter_plan(_base(model), model.peft_config)
    return original(model, *args, **kwargs)


def _load(original: Any, *args: Any, **kwargs: Any) -> Any:
    with holding(_loading, True):
        return original(*args, **kwargs)


_patch = functools.partial(patch, lost="adapters do not store the activations that they were trained with")

INSTALLERS: dict[str, Installer] = {
    "peft.config": both(
        _patch("PeftConfigMixin.from_peft_type", _from_peft_type),
        _patch("PeftConfigMixin.save_pretrained", _save_config),
    ),
    "peft.mapping": _patch("inject_adapter_in_model", _inject),
    "peft.peft_model": both(
        _patch("PeftModel.__init__", _init),
        _patch("PeftModel.add_adapter", _add_adapter),
        _patch("PeftModel.from_pretrained", _load),
        _patch("PeftModel.load_adapter", _load),
        _patch("PeftModel.save_pretrained", _save),
    ),
    "peft.mixed_model": both(
        _patch("PeftMixedModel.__init__", _init),
        _patch("PeftMixedModel.add_adapter", _add_adapter),
        _patch("PeftMixedModel.from_pretrained", _load),
    ),
    # A transformers model's `load_adapter`, which `from_pretrained` calls for the folder of an adapter.
    "transformers.integrations.peft": _patch("PeftAdapterMixin.load_adapter", _load),
}
