"""sentence-transformers: `Dense` layers save the name of their activation.

Without this, they save its class, which does not determine n and eps.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

from ..family.names import is_claimed
from ..modules import GemActivation, get_activation
from .registry import Installer, both, patch

_KEY = "activation_function"
_HUB = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
_LOST = "its Dense layers cannot be loaded with an activation of the family"
_name: ContextVar[str | None] = ContextVar("hf_gem_dense_activation", default=None)


def _get_config(original: Any, module: Any) -> dict[str, Any]:
    config: dict[str, Any] = original(module)
    activation = getattr(module, _KEY, None)
    if isinstance(activation, GemActivation):
        config[_KEY] = activation.spec.name
    return config


def _load_config(original: Any, cls: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    config: dict[str, Any] = original(cls, *args, **kwargs)
    _name.set(config.pop(_KEY) if is_claimed(config.get(_KEY)) else None)  # the loader would import it as a class
    return config


def _load(original: Any, cls: Any, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
    cls.load_config(model_name_or_path, **{key: kwargs[key] for key in _HUB if key in kwargs})
    if (name := _name.get()) is not None:
        kwargs["init_defaults"] = {**(kwargs.get("init_defaults") or {}), _KEY: get_activation(name)}
    return original(cls, model_name_or_path, *args, **kwargs)


INSTALLERS: dict[str, Installer] = {
    "sentence_transformers.base.modules.module": patch("Module.load_config", _load_config, _LOST),
    "sentence_transformers.base.modules.dense": both(
        patch("Dense.get_config_dict", _get_config, _LOST), patch("Dense.load", _load, _LOST)
    ),
}
