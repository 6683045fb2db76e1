"""What the registries of both libraries need: mappings that know every well-formed name, and reversible patches."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..spec import GemSpec, is_claimed, is_name, parse

# What registers with a module that has just been imported, and what takes it back.
Installer = tuple[Callable[[ModuleType], None], Callable[[ModuleType], None]]


class NameLookup(dict):
    """Mixin for a dict of activations: a missing key that is a name of the family is made on the fly.

    Subclasses set `make`. Keys that are there always win, so what the library registers itself is untouched; iteration
    and length show them only.
    """

    make: Callable[[GemSpec], Any]

    def __missing__(self, key: object) -> Any:
        if is_claimed(key):
            return type(self).make(parse(key))  # a malformed name raises, saying the nearest
        raise KeyError(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return (
            type(self).make(parse(key))
            if not super().__contains__(key) and is_claimed(key)
            else super().get(key, default)
        )

    def __contains__(self, key: object) -> bool:
        # A malformed name counts too: the lookup that follows explains it, which "not found" would not.
        return super().__contains__(key) or is_claimed(key)


def refuse_conflicts(registry: dict[str, Any], where: str) -> None:
    """Raises ValueError where `registry` itself holds one of our names."""
    for key in list(registry):
        if is_name(key):
            raise ValueError(
                f"{where}[{key!r}] is already {dict.get(registry, key)!r}; hf_gem does not overwrite it. "
                f"Remove it with `del {where}[{key!r}]`, then import hf_gem again"
            )


def lookups(where: str, dicts: dict[str, type[NameLookup]], beside: tuple[str, ...] = ()) -> Installer:
    """The pair that replaces dicts of the module `where` by lookups, unless they or those `beside` hold our names."""

    def install(module: Any) -> None:
        for name in (*dicts, *beside):
            refuse_conflicts(getattr(module, name), f"{where}.{name}")
        for name, lookup in dicts.items():
            if not isinstance(getattr(module, name), lookup):
                setattr(module, name, lookup(getattr(module, name)))

    def uninstall(module: Any) -> None:
        for name in dicts:
            setattr(module, name, dict(getattr(module, name)))

    return install, uninstall


def method_patch(cls_name: str, name: str, wrapper: Callable[..., Any]) -> Installer:
    """The pair that makes a method call `wrapper(original, self, *args, **kwargs)` instead, and undoes it.

    For a class method, `self` is the class.
    """
    patches: dict[type, tuple[Any, Any]] = {}  # class -> original, ours
    active: set[type] = set()

    def install(module: ModuleType) -> None:
        cls = getattr(module, cls_name, None)
        original = vars(cls).get(name) if cls is not None else None
        if cls is None or original is None:
            warnings.warn(
                f"hf_gem knows {module.__name__}.{cls_name}.{name} from transformers 5.17 on and finds none here: "
                "names of the family work in every activation field, but `hidden_act` is not passed on to the field "
                "that a config reads, a learnable eps needs to be in the checkpoint, and conversions are not replayed",
                stacklevel=2,
            )
            return
        active.add(cls)
        if cls not in patches:
            patches[cls] = original, patched(cls, original)
            setattr(cls, name, patches[cls][1])

    def patched(cls: type, original: Any) -> Any:
        function = original.__func__ if isinstance(original, classmethod) else original

        @functools.wraps(function)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if cls in active:
                return wrapper(function, self, *args, **kwargs)
            return function(self, *args, **kwargs)  # uninstalled, but wrapped by somebody else in the meantime

        return classmethod(method) if isinstance(original, classmethod) else method

    def uninstall(module: ModuleType) -> None:
        cls = getattr(module, cls_name, None)
        if cls in active:
            active.discard(cls)
            if vars(cls)[name] is patches[cls][1]:
                setattr(cls, name, patches.pop(cls)[0])

    return install, uninstall


def function_patch(name: str, wrapper: Callable[..., Any], lost: str) -> Installer:
    """The pair that makes a function of a module call `wrapper(original, *args, **kwargs)`, and undoes it.

    This holds wherever the function has been imported to. `lost` is what a version of the library without it lacks.
    """
    patches: list[tuple[Callable[..., Any], Callable[..., Any]]] = []  # original, ours: one or none
    active = False

    def install(module: ModuleType) -> None:
        nonlocal active
        original = getattr(module, name, None)
        if original is None:
            warnings.warn(f"hf_gem finds no {module.__name__}.{name} in this version: {lost}", stacklevel=2)
            return
        active = True
        if not patches:
            patches.append((original, patched(original)))
            setattr(module, name, patches[0][1])
            replace_everywhere(name, *patches[0])

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def ours(*args: Any, **kwargs: Any) -> Any:
            if active:
                return wrapper(original, *args, **kwargs)
            return original(*args, **kwargs)  # uninstalled, but kept by somebody else in the meantime

        return ours

    def uninstall(module: ModuleType) -> None:
        nonlocal active
        active = False
        if patches and getattr(module, name) is patches[0][1]:
            original, ours = patches.pop()
            setattr(module, name, original)
            replace_everywhere(name, ours, original)

    return install, uninstall


def replace_everywhere(name: str, old: object, new: object) -> None:
    """Rebinds `name` in every module that holds `old` by this name, as `from ... import name` leaves it."""
    for module in list(sys.modules.values()):
        # vars, not getattr: a lazy module would import half of its package to answer.
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)
