"""transformers: `ACT2FN`, `ACT2CLS`, the config fields, and the initialisation of a learnable eps.

`ACT2FN` is shared by every importer, so it is given a class that knows our names. `ACT2CLS` is a plain dict, whose
class cannot be changed: it is replaced by a dict of ours in every module that holds it.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from types import ModuleType
from typing import Any

from ..modules import GemActivation, module_factory
from ..spec import is_claimed, parse
from .registry import Installer, NameLookup, method_patch, refuse_conflicts

# The names under which configs declare the feed-forward activation when it is not `hidden_act`.
_CONFIG_FIELDS = ("activation_function", "hidden_activation", "activation", "dense_act_fn", "ff_activation")


class _Act2Cls(NameLookup):
    make = staticmethod(module_factory)


def _install_activations(module: ModuleType) -> None:
    if isinstance(module.ACT2CLS, _Act2Cls):
        return
    refuse_conflicts(module.ACT2FN, "transformers.activations.ACT2FN")
    refuse_conflicts(module.ACT2CLS, "transformers.activations.ACT2CLS")
    instantier = type(module.ACT2FN)  # its __getitem__ builds what a lookup returns
    module.ACT2FN.__class__ = type(f"Gem{instantier.__name__}", (NameLookup, instantier), {"make": _Act2Cls.make})
    _replace_everywhere("ACT2CLS", module.ACT2CLS, _Act2Cls(module.ACT2CLS))


def _uninstall_activations(module: ModuleType) -> None:
    if not isinstance(module.ACT2CLS, _Act2Cls):
        return
    module.ACT2FN.__class__ = type(module.ACT2FN).__mro__[2]
    _replace_everywhere("ACT2CLS", module.ACT2CLS, dict(module.ACT2CLS))


def _replace_everywhere(name: str, old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        # vars, not getattr: a lazy module would import half of its package to answer.
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)


def _config_post_init(original: Any, config: Any, **kwargs: Any) -> None:
    """`hidden_act` with one of our names sets the field that the config really reads, instead of being ignored."""
    name = kwargs.get("hidden_act", "")
    if is_claimed(name):
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        own = next((field for field in _CONFIG_FIELDS if field in defaults), None)
        if own is not None:
            _set_own_field(config, own, defaults[own], parse(kwargs.pop("hidden_act")).name)
        else:
            warnings.warn(
                f"{type(config).__name__} has no field hidden_act, so hidden_act={name!r} has no effect: set the field "
                "from which the model takes its activation",
                stacklevel=2,
            )
    original(config, **kwargs)


def _set_own_field(config: Any, own: str, default: Any, name: str) -> None:
    current = getattr(config, own)
    if config.transformers_version is not None:  # it comes from a file
        warnings.warn(
            f"ignoring hidden_act={name!r} in a saved {type(config).__name__}: the model was built with "
            f"{own}={current!r}. Remove the key from config.json, or set {own} to change the activation",
            stacklevel=2,
        )
    elif current not in (default, name):
        raise ValueError(
            f"{type(config).__name__} got {own}={current!r} and hidden_act={name!r}, which set the same thing; give one"
        )
    else:
        setattr(config, own, name)


def _initialize_weights(original: Any, model: Any, module: Any, *args: Any, **kwargs: Any) -> None:
    """A learnable eps that the checkpoint lacks starts from its name; transformers would leave memory as it came."""
    if isinstance(module, GemActivation) and not getattr(module, "_is_hf_initialized", False):
        module.reset_parameters()  # under transformers' guard, which skips what the checkpoint had
    original(model, module, *args, **kwargs)


INSTALLERS: dict[str, Installer] = {
    "transformers.activations": (_install_activations, _uninstall_activations),
    "transformers.configuration_utils": method_patch("PreTrainedConfig", "__post_init__", _config_post_init),
    "transformers.modeling_utils": method_patch("PreTrainedModel", "_initialize_weights", _initialize_weights),
}
