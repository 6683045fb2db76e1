"""Gated feed-forwards with one call for `activation(gate) * up`: `patch_glu` and `unpatch_glu`.

A patched module gets a subclass of its own class, in which every product of `self.<activation>(gate)` is written as the
fused call. So the formula around it may be any: dropout in T5, chunks in Phi-3, the loop or the grouped product of
experts. Nothing is kept on the instance, and parameters, hooks and copies are those of the original class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from .. import functional
from .._torch import has_hooks, is_tracing
from ..modules import CALLED, EGEM, GEM, SEGEM, GemActivation
from .kinds import describe, stock_slots
from .reports import path_patterns, places

_FUSED = "_hf_gem_fused"  # on a patched class: the original one, and the names of its activations
_CALL = "_hf_gem_glu"  # what rewritten code calls, a keyword argument with a default


@dataclass(frozen=True)
class GluPatch:
    """What `patch_glu` did.

    Attributes:
        patched: Paths of the modules whose products are fused now.
        left: (path, reason) of those that hold an activation of the family, or multiply another, and are as they were.
    """

    patched: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        where = f": {path_patterns(list(self.patched))}" if self.patched else ""
        lines = [f"{len(self.patched)} gated modules fused{where}"]
        groups: dict[str, list[str]] = {}
        for path, reason in self.left:
            groups.setdefault(reason, []).append(path)
        lines += [f"  left alone, {why}: {places(paths)}" for why, paths in groups.items()]
        return "\n".join(lines)


def patch_glu(model: nn.Module) -> GluPatch:
    """Makes every `activation(gate) * up` in a model one fused call, `hf_gem.functional.gem_glu`; in place.

    Found are the modules that hold an activation of the family and multiply `self.<activation>(gate)` by something in
    their own code, whatever their class and attributes are called. That code is read, and only where its source is what
    really runs. The layers around the activation are called as before, adapters and quantised ones too, and everything
    else is computed as it was: outputs differ by rounding, since the product is rounded once instead of twice.

    Each call looks at the activation that is there at that time. Where this is not one of the family any more, has an
    eps for each channel, is wrapped, or has hooks that want to see it run (`hf_gem.audit` has), or where the factors
    differ in shape or dtype, the module computes `activation(gate) * up` as it did before.

    Parameters, `state_dict`, `isinstance` and the names of classes stay. Copies and pickles are patched too. A model
    that `from_pretrained` builds is not: patch it again. `hf_gem.unpatch_glu` undoes all of it.

    Args:
        model: Any model, compiled or not; before `fully_shard`, and after `hf_gem.convert`.

    Returns:
        The report. Print it. Modules that were patched already count as patched.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is nothing to patch.
    """
    _check(model)
    held: dict[nn.Module, tuple[str, dict[str, Any]]] = {}
    for slot in stock_slots(model):
        held.setdefault(slot.owner, (slot.path.rpartition(".")[0], {}))[1][slot.key] = slot.occupant
    chosen: dict[nn.Module, tuple[str, frozenset[str]]] = {}
    left = []
    for module, (path, activations) in held.items():
        keys, reasons = _choose(module, activations)
        left += [(path, reason) for reason in reasons]
        if keys:
            chosen[module] = path, keys
    report = GluPatch(tuple(path for path, _ in chosen.values()), tuple(left))
    if not chosen:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}, which has no module that computes self.activation(gate) * up "
            "with an activation of the family; build it with one, such as hidden_act='gem_n2', or call hf_gem.convert "
            f"first. {report}"
        )
    for module, (_, keys) in chosen.items():
        if not _is_patched(module) or _FUSED in vars(type(module)):  # else a class around ours, which goes on
            _set_class(module, _fused(_original(module), keys))
    return report


def unpatch_glu(model: nn.Module) -> list[str]:
    """Gives every module that `patch_glu` patched its own class again, and returns their paths.

    Raises:
        TypeError: `model` is not a module.
        ValueError: a patched module has got another class since. Nothing is changed then.
    """
    _check(model)
    patched = {path: module for path, module in model.named_modules() if _is_patched(module)}
    for path, module in patched.items():
        if _FUSED not in vars(type(module)):
            raise ValueError(
                f"{path or 'the model'} was made a {type(module).__name__} after it was patched, by fully_shard or a "
                "parametrization, and its class cannot be taken apart; undo that first, or call unpatch_glu before it"
            )
    for module in patched.values():
        _set_class(module, _original(module))
    return list(patched)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        kind = " (a class: build it first)" if isinstance(model, type) else ""
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}{kind}; pass the model itself")


def _choose(module: nn.Module, activations: dict[str, Any]) -> tuple[frozenset[str], list[str]]:
    """The attributes whose products are to be fused, and what to say of the others."""
    methods, unreadable = _products(_original(module), frozenset(activations))
    if not getattr(module, "has_gate", True):
        methods = {}  # experts of transformers inherit the product, and do not call it
    multiplied = frozenset[str]().union(*(keys for _, keys in methods.values()))
    keys = frozenset(key for key in multiplied if _can_fuse(activations[key]))
    reasons = [f"its {key} is {_described(activations[key])}" for key in sorted(multiplied - keys)]
    if keys and "forward" in methods and "forward" in vars(module) and "forward" not in _kept_methods(module).values():
        keys, reasons = frozenset(), [*reasons, "its forward was replaced on the instance"]
    ours = {key for key, act in activations.items() if isinstance(act, GemActivation)}
    if ours - multiplied:
        name = type(module).__name__
        reasons += unreadable or [f"the code of {name} has no product self.{min(ours - multiplied)}(gate) * up"]
    return keys, reasons


def _described(act: Any) -> str:
    if not isinstance(act, GemActivation):
        return describe(act)
    return f"{describe(act)}, " + ("with an eps for each channel" if act.num_parameters > 1 else type(act).__name__)


# ---- the call


def _can_fuse(act: Any) -> bool:
    return type(act) in (GemActivation, GEM, EGEM, SEGEM) and act.num_parameters == 1


def _glu(*, act: Any, gate: Any, up: Any) -> Any:
    """`act(gate) * up`, by one call where that is the same but for rounding."""
    plain = type(gate) is Tensor and type(up) is Tensor and not is_tracing()  # not sharded, nested, of fx ...
    if plain and gate.shape == up.shape and gate.dtype == up.dtype and _can_fuse(act) and not _is_watched(act):
        if not torch.compiler.is_compiling():
            vars(act)[CALLED] = True
        elif act.log_ratio is None:
            return act.captured(gate, up)
        eps = act.init_eps if act.log_ratio is None else act.eps.view([])
        return functional.gem_glu(gate, up, family=act.family, n=act.n, eps=eps)
    return act(gate) * up


def _is_watched(act: nn.Module) -> bool:
    """Whether a call of this does more than its class says: hooks, or a forward in place of its own."""
    return has_hooks(act) or "forward" in vars(act)


# ---- classes


def _is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), _FUSED)


def _original(module: nn.Module) -> Any:
    return getattr(type(module), _FUSED, (type(module),))[0]


def _kept_methods(module: nn.Module) -> dict[str, str]:
    """Attribute -> method of its class that the module keeps there, as it does under the hooks of accelerate."""
    kept = {key: held for key, held in vars(module).items() if inspect.ismethod(held) and held.__self__ is module}
    names = {key: held.__name__ for key, held in kept.items()}
    return {key: name for key, name in names.items() if getattr(type(module), name, None) is kept[key].__func__}


def _set_class(module: nn.Module, cls: Any) -> None:
    kept = _kept_methods(module)
    module.__class__ = cls
    vars(module).update({key: types.MethodType(getattr(cls, name), module) for key, name in kept.items()})


@functools.cache
def _fused(cls: Any, keys: frozenset[str]) -> Any:
    """A subclass with the same name whose methods call `_glu` for the products of `keys`; always the same one."""
    methods, _ = _products(cls, keys)
    if not methods:
        return cls  # a pickle, of another version of its library

    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Pickles find a class by its name, and that is the original one."""
        reduced = cls.__reduce_ex__(self, 2)
        return (_new, (cls, keys), *reduced[2:]) if type(self) is fused else reduced

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    functions = {name: function for name, (function, _) in methods.items()}
    extra = {_FUSED: (cls, keys), "__reduce_ex__": reduce_ex}
    fused = type(cls)(cls.__name__, (cls,), {**names, **functions, **extra})
    return fused


def _new(cls: Any, keys: frozenset[str]) -> Any:
    fused = _fused(cls, keys)
    return fused.__new__(fused)


# ---- code


class _UnreadableError(Exception):
    pass


@functools.cache
def _products(cls: type, keys: frozenset[str]) -> tuple[dict[str, tuple[Any, set[str]]], list[str]]:
    """Method -> its fused version, and the attributes of `keys` that it multiplies; and why others were not read."""
    methods = {}
    unreadable = []
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, types.FunctionType) and not name.startswith("__"):
            try:
                function, found = _rewritten(method, keys)
            except _UnreadableError as error:
                unreadable.append(f"its {name} {error}")
            else:
                methods.update({name: (function, found)} if found else {})
    return methods, unreadable


def _rewritten(function: types.FunctionType, keys: frozenset[str]) -> tuple[types.FunctionType, set[str]]:
    """A function with the fused call in place of products, and the attributes in these.

    Raises:
        _UnreadableError: it uses one, and its source is not to be had.
    """
    code, closure, defaults = function.__code__, function.__closure__ or (), function.__kwdefaults__
    inner = getattr(function, "__wrapped__", None)
    if isinstance(inner, types.FunctionType):  # in the closure of its decorator
        new_inner, found = _rewritten(inner, keys)
        closure = tuple(types.CellType(new_inner) if cell == types.CellType(inner) else cell for cell in closure)
        if found and types.CellType(new_inner) not in closure:
            raise _UnreadableError("is wrapped by a decorator that hides it")
    else:
        code, found = _rewritten_code(code, keys)
        defaults = {**(defaults or {}), _CALL: _glu}
    if not found:
        return function, found
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = defaults
    return functools.update_wrapper(new, function), found  # type: ignore[return-value]


def _rewritten_code(code: types.CodeType, keys: frozenset[str]) -> tuple[types.CodeType, set[str]]:
    """The same for its code: the file is compiled with the products of this function rewritten."""
    if keys.isdisjoint(name for part in (code, *_codes(code)) for name in part.co_names):
        return code, set()
    try:
        source = "".join(inspect.findsource(code)[0])
        codes = _compiled(source, code.co_filename)
    except (OSError, SyntaxError):
        raise _UnreadableError("has no source") from None
    if code not in codes:
        raise _UnreadableError("is not what its source says")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            rewriter = _Rewriter(node, keys, code)
            rewriter.visit(node)
            node.args.kwonlyargs.append(ast.arg(_CALL))
            node.args.kw_defaults.append(None)  # the function gets it
            new = compile(ast.fix_missing_locations(tree), code.co_filename, "exec", dont_inherit=True)
            return list(_codes(new))[codes.index(code)], rewriter.found
    raise _UnreadableError("is no def")


def _first_line(node: ast.FunctionDef) -> int:
    return node.decorator_list[0].lineno if node.decorator_list else node.lineno


@functools.lru_cache(maxsize=4)
def _compiled(source: str, file: str) -> list[types.CodeType]:
    return list(_codes(compile(source, file, "exec", dont_inherit=True)))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield part
            yield from _codes(part)


class _Rewriter(ast.NodeTransformer):
    """Writes `_glu(act=self.key, gate=gate, up=up)` for `self.key(gate) * up`, for some keys.

    And for `a * up` where `a = self.key(gate)` has no other use. The activation runs later than it did then, when both
    factors are there, so its input must be what a layer has returned, or there must be no call in `up` to overwrite it.
    """

    def __init__(self, function: ast.FunctionDef, keys: frozenset[str], code: types.CodeType) -> None:
        self.found: set[str] = set()
        self._keys = keys
        self._self = code.co_varnames[0] if code.co_argcount else ""
        self._assigned: dict[str, ast.Assign] = {}
        nodes = list(ast.walk(function))
        uses = Counter(getattr(node, field, None) for node in nodes for field in ("id", "arg", "name"))
        for node in function.body:  # not in a branch, or under no_grad, where the product is not
            if isinstance(node, ast.Assign) and self._is_call(node.value) and self._is_fresh(node.value.args[0]):
                target = node.targets[0]
                if isinstance(target, ast.Name) and len(node.targets) == 1 and uses[target.id] == 2:
                    self._assigned[target.id] = node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        self.generic_visit(node)
        for factor, up in ((node.left, node.right), (node.right, node.left)):
            assignment = self._assigned.get(factor.id) if isinstance(factor, ast.Name) else None
            call = assignment.value if assignment else factor
            is_scale = isinstance(up, ast.Constant) or self._attribute(up)
            if isinstance(node.op, ast.Mult) and self._is_call(call) and not is_scale:
                gate = call.args[0]
                if assignment:
                    assignment.value, gate = gate, factor
                elif factor is node.left and self._may_change(up, gate):
                    continue
                self.found.add(self._attribute(call.func))
                arguments = [ast.keyword("act", call.func), ast.keyword("gate", gate)]
                # In the order of the factors, so that dropout draws as it did.
                arguments.insert(2 if factor is node.left else 0, ast.keyword("up", up))
                return ast.copy_location(ast.Call(ast.Name(_CALL, ast.Load()), [], arguments), node)
        return node

    def _is_call(self, node: ast.AST) -> TypeGuard[ast.Call]:
        """Whether this is `self.key(gate)`."""
        if not isinstance(node, ast.Call) or self._attribute(node.func) not in self._keys or node.keywords:
            return False
        return len(node.args) == 1 and not isinstance(node.args[0], ast.Starred)

    def _attribute(self, node: ast.AST) -> str:
        """The attribute of self that this is, or ""."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self._self:
            return node.attr
        return ""

    def _is_fresh(self, gate: ast.AST) -> bool:
        """Whether this is what a layer has returned; a function may return a view of what it was given."""
        return isinstance(gate, ast.Call) and self._attribute(gate.func) != ""

    def _may_change(self, up: ast.AST, gate: ast.AST) -> bool:
        return not self._is_fresh(gate) and any(isinstance(part, ast.Call) for part in ast.walk(up))
