"""What other activations look like: recognised by the field's names, wherever a module or function was written."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from .conversion import Slot
from .modules import GemActivation

# Ends of names: StarReLU, ReLUSquared, GELUTanh, leaky_relu, NewGELU, XIELU ...
_ACTIVATION = re.compile(r".*(relu6?|gelu|silu|swish|mish|[a-z]elu|^elu)(squared|tanh|new)?")
_GATE = re.compile(r"(hard|log)?sigmoid|(hard)?tanh|softsign|softplus|sqrtsoftplus|laplace")
# Subclasses of these apply an activation to what they compute: LinearReLU.
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


def kind(occupant: Any) -> str | None:
    """The name of an activation as lower-case letters, such as `relu`, `gelutanh`, `hardswish`; None for anything else.

    A module counts when it has no submodules and is no layer with weights; a class, kept to be instantiated, does not.
    """
    if isinstance(occupant, GemActivation):
        return occupant.family
    if isinstance(occupant, nn.Module):
        is_layer = bool(occupant._modules) or isinstance(occupant, _LAYERS)
        name = "" if is_layer else type(occupant).__name__
    else:
        while isinstance(occupant, functools.partial):
            occupant = occupant.func
        name = (
            getattr(occupant, "__name__", "") if inspect.isroutine(occupant) and not inspect.ismethod(occupant) else ""
        )
    name = re.sub(r"(activation|me|jit)$", "", name.lower().replace("_", ""))
    if name == "swish":
        return "silu"
    return name if _ACTIVATION.fullmatch(name) or _GATE.fullmatch(name) else None


def is_gate(kind: str) -> bool:
    """Whether this is a bounded function or a softplus, which networks use as gates, not between layers."""
    return _GATE.fullmatch(kind) is not None


def stock_slots(model: nn.Module) -> Iterator[Slot]:
    """Every place that holds an activation: submodules, those in containers too, and attributes that are functions."""
    for path, owner in model.named_modules(remove_duplicate=False):
        if kind(owner) is not None:
            continue  # what an activation is made of
        for key, occupant in [*owner._modules.items(), *vars(owner).items()]:
            if not key.startswith("_") and occupant is not None and kind(occupant) is not None:
                yield Slot(f"{path}.{key}".lstrip("."), owner, key)
