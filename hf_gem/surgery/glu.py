"""Fuses `activation(gate) * up` in gated feed-forwards into one call: `patch_glu` and `unpatch_glu`.

A patched module gets a subclass of its own class, whose code has a fused call instead of each product with
`self.<activation>(gate)`. So the surrounding formula does not matter: dropout in T5, chunks in Phi-3, the loop or the
grouped product of experts. The instance stores nothing, and parameters, hooks and copies work as in the original class.
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
from .reports import counted, path_patterns, places

_FUSED = "_hf_gem_fused"  # an attribute of a patched class: the original class
_CALL = "_hf_gem_glu"  # the function that rewritten code calls: a keyword argument with a default


@dataclass(frozen=True)
class GluPatch:
    """The report of `patch_glu`.

    Attributes:
        patched: Paths of the modules whose products are now fused.
        left: (path, reason) of the modules that were not patched, although they hold an activation of the family or
            multiply another activation.
    """

    patched: tuple[str, ...]
    left: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        where = f": {path_patterns(list(self.patched))}" if self.patched else ""
        lines = [f"{counted(len(self.patched), 'gated module')} fused{where}"]
        groups: dict[str, list[str]] = {}
        for path, reason in self.left:
            groups.setdefault(reason, []).append(path)
        lines += [f"  left alone, {why}: {places(paths)}" for why, paths in groups.items()]
        return "\n".join(lines)


def patch_glu(model: nn.Module) -> GluPatch:
    """Replaces every `activation(gate) * up` in a model by one fused call, `hf_gem.functional.gem_glu`, in place.

    It finds modules that hold an activation of the family and multiply `self.<activation>(gate)` by something in their
    own code, whatever the names of their class and attributes. It reads that code, provided that the source matches
    what really runs. The layers around the activation are called as before, including adapters and quantised layers.
    Outputs only differ by rounding, since the product is rounded once instead of twice.

    Each call checks the current activation. The module computes `activation(gate) * up` as before if the activation is
    no longer one of the family, has an eps per channel, is wrapped, or has hooks that need to see it run (such as those
    of `hf_gem.audit`), or if the factors differ in shape or dtype.

    Parameters, `state_dict`, `isinstance` and class names do not change. Copies and pickles are patched too. A model
    built by `from_pretrained` is not, so patch it again. `hf_gem.unpatch_glu` undoes the patch.

    Args:
        model: Any model, compiled or not. Patch it before `fully_shard` and after `hf_gem.convert`.

    Returns:
        The report. Print it. Modules that were patched before count as patched.

    Raises:
        TypeError: `model` is not a module.
        ValueError: There is nothing to patch.
    """
    _check(model)
    held: dict[nn.Module, tuple[str, dict[str, Any]]] = {}
    for slot in stock_slots(model):
        held.setdefault(slot.owner, (slot.path.rpartition(".")[0], {}))[1][slot.key] = slot.occupant
    chosen: dict[nn.Module, tuple[str, _Names]] = {}
    left = []
    for module, (path, activations) in held.items():
        names, reasons = _choose(module, activations)
        left += [(path, reason) for reason in reasons]
        if names.activations:
            chosen[module] = path, names
    report = GluPatch(tuple(path for path, _ in chosen.values()), tuple(left))
    if not chosen:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}. It has no module that computes self.activation(gate) * up "
            "with an activation of the family. Build it with one, such as hidden_act='gem_n2', or call hf_gem.convert "
            f"first. {report}"
        )
    for module, (_, names) in chosen.items():
        if not _is_patched(module) or _FUSED in vars(type(module)):  # otherwise another class wraps the patched one
            _set_class(module, _fused(_original(module), names))
    return report


def unpatch_glu(model: nn.Module) -> list[str]:
    """Undoes `patch_glu`: gives every patched module its original class, and returns their paths.

    Args:
        model: The patched model.

    Returns:
        The paths of the modules that were patched.

    Raises:
        TypeError: `model` is not a module.
        ValueError: The class of a patched module was changed later. Nothing is changed then.
    """
    _check(model)
    patched = {path: module for path, module in model.named_modules() if _is_patched(module)}
    for path, module in patched.items():
        if _FUSED not in vars(type(module)):
            raise ValueError(
                f"{path or 'the model'} became a {type(module).__name__} after it was patched, for example by "
                "fully_shard or a parametrization. Its class can only be restored before that. Undo that first, or "
                "call unpatch_glu earlier."
            )
    for module in patched.values():
        _set_class(module, _original(module))
    return list(patched)


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        fix = "Build it first." if isinstance(model, type) else "Pass the model itself."
        raise TypeError(f"got {type(model).__name__} as model. model must be a torch.nn.Module. {fix}")


def _choose(module: nn.Module, activations: dict[str, Any]) -> tuple[_Names, list[str]]:
    """Returns the names for the products to fuse, and the reasons against the other products."""
    layers = _layers(module)
    methods, unreadable = _products(_original(module), _Names(frozenset(activations), layers))
    if not getattr(module, "has_gate", True):
        methods = {}  # such experts of transformers inherit the product but do not call it
    multiplied = frozenset[str]().union(*(keys for _, keys in methods.values()))
    keys = frozenset(key for key in multiplied if _can_fuse(activations[key]))
    reasons = [f"its {key} is {_described(activations[key])}" for key in sorted(multiplied - keys)]
    if keys and "forward" in methods and "forward" in vars(module) and "forward" not in _kept_methods(module).values():
        keys, reasons = frozenset(), [*reasons, "its forward was replaced on the instance"]
    ours = {key for key, act in activations.items() if isinstance(act, GemActivation)}
    if ours - multiplied:
        name = type(module).__name__
        reasons += unreadable or [f"the code of {name} has no product self.{min(ours - multiplied)}(gate) * up"]
    return _Names(keys, layers), reasons


def _layers(module: nn.Module) -> frozenset[str]:
    """Returns the names of the submodules with weights.

    Some quantised layers keep their weights in buffers. Buffers with one value belong to observers and counters.
    """
    children = dict(module.named_children())
    with_parameters = {key for key, child in children.items() if any(True for _ in child.parameters())}
    with_buffers = {key for key, child in children.items() if any(b.numel() > 1 for b in child.buffers())}
    return frozenset(with_parameters | with_buffers)


def _described(act: Any) -> str:
    if not isinstance(act, GemActivation):
        return describe(act)
    return f"{describe(act)}, " + ("with an eps for each channel" if act.num_parameters > 1 else type(act).__name__)


# ---- the call


def _can_fuse(act: Any) -> bool:
    return type(act) in (GemActivation, GEM, EGEM, SEGEM) and act.num_parameters == 1


def _glu(*, act: Any, gate: Any, up: Any) -> Any:
    """Computes `act(gate) * up`, in one call if the result only differs by rounding."""
    plain = type(gate) is Tensor and type(up) is Tensor and not is_tracing()  # not sharded, nested, an fx proxy etc.
    if plain and gate.shape == up.shape and gate.dtype == up.dtype and _can_fuse(act) and not _is_watched(act):
        if not torch.compiler.is_compiling():
            vars(act)[CALLED] = True
        elif act.log_ratio is None:
            return act.captured(gate, up)
        eps = act.init_eps if act.log_ratio is None else act.eps.view([])
        return functional.gem_glu(gate, up, family=act.family, n=act.n, eps=eps)
    return act(gate) * up


def _is_watched(act: nn.Module) -> bool:
    """Returns whether a call does more than the class defines, because of hooks or a replaced forward."""
    return has_hooks(act) or "forward" in vars(act)


# ---- classes


def _is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), _FUSED)


def _original(module: nn.Module) -> Any:
    return getattr(type(module), _FUSED, type(module))


def _kept_methods(module: nn.Module) -> dict[str, str]:
    """Returns attribute -> name of the class's method that the instance stores there, as with accelerate's hooks."""
    kept = {key: held for key, held in vars(module).items() if inspect.ismethod(held) and held.__self__ is module}
    names = {key: held.__name__ for key, held in kept.items()}
    return {key: name for key, name in names.items() if getattr(type(module), name, None) is kept[key].__func__}


def _set_class(module: nn.Module, cls: Any) -> None:
    kept = _kept_methods(module)
    module.__class__ = cls
    vars(module).update({key: types.MethodType(getattr(cls, name), module) for key, name in kept.items()})


@functools.cache
def _fused(cls: Any, names: _Names) -> Any:
    """Returns the subclass with the same name whose methods call `_glu` for the products."""
    methods, _ = _products(cls, names)
    if not methods:
        return cls  # a pickle from another version of its library

    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Pickling looks up a class by its name, which finds the original class."""
        reduced = cls.__reduce_ex__(self, 2)
        return (_new, (cls, names), *reduced[2:]) if type(self) is fused else reduced

    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    functions = {name: function for name, (function, _) in methods.items()}
    extra = {_FUSED: cls, "__reduce_ex__": reduce_ex}
    fused = type(cls)(cls.__name__, (cls,), {**own, **functions, **extra})
    return fused


def _new(cls: Any, names: _Names) -> Any:
    fused = _fused(cls, names)
    return fused.__new__(fused)


# ---- code


@dataclass(frozen=True)
class _Names:
    """Names of attributes that matter in the code of a class.

    Attributes:
        activations: Those whose products are to be fused.
        layers: Submodules with weights. Others, such as a dropout, may return their own input.
    """

    activations: frozenset[str]
    layers: frozenset[str]


class _UnreadableError(Exception):
    pass


@functools.cache
def _products(cls: type, names: _Names) -> tuple[dict[str, tuple[Any, set[str]]], list[str]]:
    """Returns method -> (fused version, the activations it multiplies), and why others could not be read."""
    methods = {}
    unreadable = []
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, types.FunctionType) and not name.startswith("__"):
            try:
                function, found = _rewritten(method, names)
            except _UnreadableError as error:
                unreadable.append(f"its {name} {error}")
            else:
                methods.update({name: (function, found)} if found else {})
    return methods, unreadable


def _rewritten(function: types.FunctionType, names: _Names) -> tuple[types.FunctionType, set[str]]:
    """Returns a function with fused calls instead of products, and the activations in these products.

    Raises:
        _UnreadableError: The function uses one of the activations, but its source is not available.
    """
    code, closure, defaults = function.__code__, function.__closure__ or (), function.__kwdefaults__
    inner = getattr(function, "__wrapped__", None)
    if isinstance(inner, types.FunctionType):  # it is in the closure of its decorator
        new_inner, found = _rewritten(inner, names)
        closure = tuple(types.CellType(new_inner) if cell == types.CellType(inner) else cell for cell in closure)
        if found and types.CellType(new_inner) not in closure:
            raise _UnreadableError("is hidden by a decorator")
    else:
        code, found = _rewritten_code(code, names)
        defaults = {**(defaults or {}), _CALL: _glu}
    if not found:
        return function, found
    new = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__ = defaults
    return functools.update_wrapper(new, function), found  # type: ignore[return-value]


def _rewritten_code(code: types.CodeType, names: _Names) -> tuple[types.CodeType, set[str]]:
    """Does the same for the code of a function: compiles its file with the products of the function rewritten."""
    if names.activations.isdisjoint(name for part in (code, *_codes(code)) for name in part.co_names):
        return code, set()
    try:
        source = "".join(inspect.findsource(code)[0])
        codes = _compiled(source, code.co_filename)
    except (OSError, SyntaxError):
        raise _UnreadableError("has no source") from None
    if code not in codes:
        raise _UnreadableError("does not match its source")
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name and _first_line(node) == code.co_firstlineno:
            rewriter = _Rewriter(node, names, code)
            rewriter.visit(node)
            node.args.kwonlyargs.append(ast.arg(_CALL))
            node.args.kw_defaults.append(None)  # the function object gets the default
            new = compile(ast.fix_missing_locations(tree), code.co_filename, "exec", dont_inherit=True)
            return list(_codes(new))[codes.index(code)], rewriter.found
    raise _UnreadableError("is not defined by a def statement")


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
    """Rewrites `self.act(gate) * up` as `_glu(act=self.act, gate=gate, up=up)`, for the given activations.

    It also rewrites `a * up` if `a = self.act(gate)` has no other use. The activation then runs later than before, when
    both factors exist. So its input must be the result of a layer with weights, or `up` must not contain a call that
    could overwrite the input.
    """

    def __init__(self, function: ast.FunctionDef, names: _Names, code: types.CodeType) -> None:
        self.found: set[str] = set()
        self._names = names
        self._self = code.co_varnames[0] if code.co_argcount else ""
        self._assigned: dict[str, ast.Assign] = {}
        nodes = list(ast.walk(function))
        uses = Counter(getattr(node, field, None) for node in nodes for field in ("id", "arg", "name"))
        for node in function.body:  # not inside a branch or a no_grad block, which may not contain the product
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
                # In the order of the factors, so that dropout draws the same numbers as before.
                arguments.insert(2 if factor is node.left else 0, ast.keyword("up", up))
                return ast.copy_location(ast.Call(ast.Name(_CALL, ast.Load()), [], arguments), node)
        return node

    def _is_call(self, node: ast.AST) -> TypeGuard[ast.Call]:
        """Returns whether this is `self.act(gate)`."""
        if not isinstance(node, ast.Call) or self._attribute(node.func) not in self._names.activations:
            return False
        return len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)

    def _attribute(self, node: ast.AST) -> str:
        """Returns the name of the attribute if this is `self.attribute`, otherwise ""."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self._self:
            return node.attr
        return ""

    def _is_fresh(self, gate: ast.AST) -> bool:
        """Returns whether this is the result of a layer. That of another call may be its argument, or a view of it."""
        return isinstance(gate, ast.Call) and self._attribute(gate.func) in self._names.layers

    def _may_change(self, up: ast.AST, gate: ast.AST) -> bool:
        return not self._is_fresh(gate) and any(isinstance(part, ast.Call) for part in ast.walk(up))
