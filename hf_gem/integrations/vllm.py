"""vLLM: adds the names of the family to its table of activations, which its own GPT-2, BERT and others read.

vLLM loads hf_gem through the entry point `vllm.general_plugins` in pyproject.toml, in each of its processes.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

from ..family.names import is_claimed, parse
from ..modules import get_activation
from ..surgery.fields import nested_configs
from ..surgery.plans import PLAN
from .registry import Installer, refuse_conflicts

_TABLE = "_ACTIVATION_REGISTRY"  # not the gated table, whose fused kernels take gate and input as one tensor


def _refuse_converted(name: str) -> None:
    """Raises ValueError while vLLM builds its own class for a converted model.

    Such a class uses one name for all of its layers. A conversion may have left layers out or given each its own.
    """
    current = sys.modules["vllm.config"].get_current_vllm_config_or_none()
    config = current.model_config.hf_config if current and current.model_config else None
    if config is not None and any(PLAN in vars(part) for part in nested_configs(config).values()):
        raise ValueError(
            f"vLLM's own model class got {name!r} from the config of a converted model. It builds one activation for "
            "all layers, and the conversion may differ between them. Use --model-impl transformers"
        )


def _install(module: ModuleType) -> None:
    table = getattr(module, _TABLE, None)
    if table is not None and not getattr(type(table), "of_hf_gem", False):
        refuse_conflicts(dict.fromkeys(table), f"{module.__name__}.{_TABLE}")
        table.__class__ = _with_names(type(table))


def _with_names(lazy: Any) -> Any:
    """Returns a subclass of vLLM's mapping that builds a new module whenever a name of the family is looked up."""

    class Names(lazy):  # type: ignore[misc]
        of_hf_gem = True

        def __getitem__(self, key: str) -> nn.Module:
            if not is_claimed(key) or key in tuple(self):  # existing keys win
                return super().__getitem__(key)  # type: ignore[no-any-return]
            spec = parse(key)  # for a malformed name, the error names the nearest valid one
            _refuse_converted(spec.name)
            return get_activation(spec.name)

        def __contains__(self, key: object) -> bool:
            return is_claimed(key) or super().__contains__(key)

    return Names


def _uninstall(module: ModuleType) -> None:
    table = getattr(module, _TABLE, None)
    if getattr(type(table), "of_hf_gem", False):
        table.__class__ = type(table).__mro__[1]


INSTALLERS: dict[str, Installer] = {"vllm.model_executor.layers.activation": (_install, _uninstall)}
