"""Recognises activations and their kinds by the usual names of modules and functions, whoever wrote them."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import children, uncompiled
from ..family.table import FAMILIES
from ..modules import GemActivation
from .slots import Slot, is_layer, join

# Endings of names such as StarReLU, ReLUSquared, GELUTanh, leaky_relu, NewGELU and XIELU.
_ACTIVATION = re.compile(r".*(relu6?|gelu|silu|swish|mish|[a-z]elu|^elu)(squared|tanh|new)?")
_GATE = re.compile(r"(h|hard|log)?sigmoid|(hard)?tanh|softsign|softplus|sqrtsoftplus|laplace")


def kind(occupant: Any) -> str | None:
    """Returns the kind of an activation in lower-case letters, such as `relu`, `gelutanh` or `hardswish`.

    Returns None for anything else. A module is no activation if it is a layer, or has a submodule that is not an
    activation. A class does not count, since it is only stored to be instantiated, and neither does a function that
    needs more than one argument.
    """
    if isinstance(occupant, GemActivation):
        return occupant.family
    if isinstance(occupant, nn.Module):
        name, call = "" if _is_layer(occupant) else type(occupant).__name__, occupant.forward
    else:
        call, inner = occupant, _without_partials(occupant)
        name = getattr(inner, "__name__", "") if inspect.isroutine(inner) and not inspect.ismethod(inner) else ""
    name = re.sub(r"(activation|me|jit)$", "", name.lower().replace("_", ""))
    if not (_ACTIVATION.fullmatch(name) or _GATE.fullmatch(name)) or _num_required(call) > 1:
        return None
    return "silu" if name == "swish" else name


def _without_partials(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _is_layer(module: nn.Module) -> bool:
    """Returns whether a module does more than apply a function, as a ConvReLU, which applies a ReLU at the end."""
    return is_layer(module) or any(kind(child) is None for child in module.children())


def _num_required(function: Callable[..., Any]) -> int:
    """Returns the number of required arguments, such as two if a bias is added before the activation. 0 if unknown."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a function written in C
        return 0
    return sum(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def is_elementwise(occupant: Any) -> bool:
    """Returns whether an activation is elementwise, as far as one trial shows.

    Those of torch, transformers and timm are. Someone's own `GatedGELU` may halve the channels, and a `NormGELU` may
    normalise.
    """
    inner = _without_partials(occupant)
    home = getattr(type(inner) if isinstance(inner, nn.Module) else inner, "__module__", None) or ""
    if home.partition(".")[0] in ("", "torch", "transformers", "timm", "hf_gem"):
        return True
    # What cannot be copied, or cannot compute in float64, is called itself.
    for make, dtype in ((as_function, torch.float64), (_itself, torch.float32)):
        try:
            return _changes_alone(make(occupant), dtype)
        except Exception:  # it may need another kind of input, which is no problem for a replacement
            continue
    return True


def _itself(activation: Callable[..., Any]) -> Callable[..., Any]:
    return activation.forward if isinstance(activation, nn.Module) else activation


@torch.no_grad()
def _changes_alone(function: Callable[..., Any], dtype: torch.dtype) -> bool:
    """Returns whether a change of one number changes no other number of the result, and the shape stays."""
    with torch.device("cpu"):
        x = torch.linspace(-2.0, 2.0, 48, dtype=dtype).reshape(2, 4, 6)
        other = x.clone()
        other[0, 0, 0] += 1.0
        y, changed = function(x.clone()), function(other)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return False
        return torch.allclose(y.flatten()[1:], changed.flatten()[1:])


def as_function(activation: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an activation as a function of float64 tensors on the CPU. Calls of it do not reach the original."""
    if not isinstance(activation, nn.Module):
        return activation
    return copy.deepcopy(activation).to("cpu", torch.float64).eval().forward  # `forward` bypasses hooks


def foreign_call(slot: Slot) -> str:
    """Returns a call of an activation in its owner's code with arguments that the family does not take, or "".

    An example is `self.act(x, approximate='tanh')`. Code without source is not searched.
    """
    takes = inspect.signature(GemActivation.forward)
    for function in _methods(type(slot.owner)):  # type: ignore[arg-type]  # classes are hashable
        if slot.key not in function.__code__.co_names:
            continue
        called = f"{next(iter(function.__code__.co_varnames), '')}.{slot.key}"
        for call in _calls(function):
            if ast.unparse(call.func) == called:
                try:
                    takes.bind("self", *call.args, **{k.arg: k for k in call.keywords if k.arg is not None})
                except TypeError:
                    return ast.unparse(call)
    return ""


def call_by_name(slot: Slot) -> str:
    """Returns a call in the owner's code that takes the activation by name instead of the module in the slot, or "".

    Mamba calls `causal_conv1d_fn(..., activation=self.activation)`, where the attribute is the string `silu`. On a GPU,
    fused kernels compute that function, whatever module the layer holds.
    """
    named = {key for key, held in vars(slot.owner).items() if isinstance(held, str)}
    for function in _methods(type(slot.owner)):  # type: ignore[arg-type]  # classes are hashable
        if named.isdisjoint(function.__code__.co_names):
            continue
        for call in _calls(function):
            for given in call.keywords:
                if given.arg == "activation" and isinstance(given.value, ast.Attribute) and given.value.attr in named:
                    return f"{ast.unparse(call.func)}(activation={ast.unparse(given.value)})"
    return ""


@functools.lru_cache(maxsize=64)
def _methods(cls: type) -> list[Any]:
    """Returns the functions of a class that run: not those that a subclass overrides, unless it calls `super()`."""
    found, overridden = [], set[str]()
    for base in cls.__mro__:
        for name, held in vars(base).items():
            function = inspect.unwrap(held) if inspect.isfunction(held) else None
            if inspect.isfunction(function) and name not in overridden:
                found.append(function)
                if "super" not in function.__code__.co_names:
                    overridden.add(name)
    return found


@functools.lru_cache(maxsize=64)  # most owners in a model are of few classes
def _calls(function: Any) -> list[ast.Call]:
    """Returns the calls in the source of a function."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def describe(occupant: Any) -> str:
    """Returns the name of an activation in a report: the full name for a member of the family, otherwise its kind."""
    return occupant.spec.name if isinstance(occupant, GemActivation) else kind(occupant) or type(occupant).__name__


def is_gate(kind: str) -> bool:
    """Returns whether this is a bounded function or a softplus, which networks use as a gate, not between layers."""
    return _GATE.fullmatch(kind) is not None


def is_stock(occupant: Any) -> bool:
    """Returns whether this is an activation outside the family, and not a gate."""
    what = kind(occupant)
    return what is not None and what not in FAMILIES and not is_gate(what)


def activation_slots(model: nn.Module) -> Iterator[Slot]:
    """Yields the slots that hold an elementwise activation, members of the family included and gates excluded."""
    for slot in stock_slots(model):
        if not is_gate(kind(slot.occupant) or "") and is_elementwise(slot.occupant):
            yield slot


def stock_slots(model: nn.Module, also: tuple[type, ...] = ()) -> Iterator[Slot]:
    """Yields all slots with an activation: submodules, also those in containers, and attributes that are functions.

    A slot in a module that occurs twice is listed once, under its first path.

    Args:
        model: Any model.
        also: Module classes that count as activations, whatever their name.
    """
    for path, owner in model.named_modules():
        if kind(owner) is not None:
            continue  # its parts are not activations of their own
        compiled = uncompiled(owner)  # torch.compile stores this attribute besides the submodule
        for key, occupant in [*children(owner).items(), *vars(owner).items()]:
            if occupant is None or occupant is compiled:
                continue
            if isinstance(occupant, also) or kind(occupant) is not None:
                yield Slot(join(path, key), owner, key)
