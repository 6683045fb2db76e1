"""timm: its activation registries, four private dicts of `timm.layers.create_act`.

Names that the memory-efficient (`_ME`) dicts do not hold are looked up in the `_DEFAULT` ones, and scriptable and
exportable modes read only these, so these two are all there is to replace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import functional
from ..modules import module_factory
from ..spec import GemSpec
from .registry import Installer, NameLookup, refuse_conflicts

_DICTS = ("_ACT_LAYER_DEFAULT", "_ACT_FN_DEFAULT")


def _function(x: Tensor, n: int, eps: float, family: str, inplace: bool = False) -> Tensor:
    """An activation function as timm calls it: `inplace` is accepted, and the input never overwritten."""
    return functional.segem(x, n, eps) if family == "segem" else functional.egem(x, n, eps)


def _make_function(spec: GemSpec) -> Callable[..., Tensor]:
    if spec.learnable:
        raise ValueError(f"{spec.name!r} has a parameter, which a function cannot own; use get_act_layer instead")
    return functools.partial(_function, n=spec.n, eps=spec.eps, family=spec.family)


class _Layers(NameLookup):
    make = staticmethod(module_factory)


class _Functions(NameLookup):
    make = staticmethod(_make_function)


def _install(module: Any) -> None:
    if isinstance(module._ACT_LAYER_DEFAULT, _Layers):
        return
    for name in (*_DICTS, "_ACT_LAYER_ME", "_ACT_FN_ME"):
        refuse_conflicts(getattr(module, name), f"timm.layers.create_act.{name}")
    module._ACT_LAYER_DEFAULT = _Layers(module._ACT_LAYER_DEFAULT)
    module._ACT_FN_DEFAULT = _Functions(module._ACT_FN_DEFAULT)


def _uninstall(module: Any) -> None:
    for name in _DICTS:
        setattr(module, name, dict(getattr(module, name)))


INSTALLERS: dict[str, Installer] = {"timm.layers.create_act": (_install, _uninstall)}
