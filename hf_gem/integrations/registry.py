"""What the registries of both libraries need: mappings that know every well-formed name, and reversible patches."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..family.names import GemSpec, is_claimed, is_name, parse

# What registers with a module that has just been imported, and what takes it back.
Installer = tuple[Callable[[ModuleType], None], Callable[[ModuleType], None]]


class NameLookup(dict[str, Any]):
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


def patch(path: str, wrapper: Callable[..., Any], lost: str) -> Installer:
    """The pair that makes `function` or `Class.method` of a module call `wrapper(original, ...)`, and undoes it.

    The arguments follow, with `self` for a method and the class for a class method. A function is replaced wherever it
    has been imported to. `lost` is what a version of the library without it lacks.
    """
    owner, _, name = path.rpartition(".")
    patches: dict[Any, tuple[Any, Any]] = {}  # module or class -> original, ours
    active: set[Any] = set()

    def install(module: ModuleType) -> None:
        place = getattr(module, owner, None) if owner else module
        original = vars(place).get(name) if place is not None else None
        if original is None:
            warnings.warn(f"hf_gem finds no {module.__name__}.{path} in this version: {lost}", stacklevel=2)
            return
        active.add(place)
        if place not in patches:
            patches[place] = original, patched(place, original)
            replace(place, *patches[place])

    def patched(place: Any, original: Any) -> Any:
        function = original.__func__ if isinstance(original, classmethod) else original

        @functools.wraps(function)
        def ours(*args: Any, **kwargs: Any) -> Any:
            if place in active:
                return wrapper(function, *args, **kwargs)
            return function(*args, **kwargs)  # uninstalled, but wrapped or kept by somebody else in the meantime

        return classmethod(ours) if isinstance(original, classmethod) else ours

    def replace(place: Any, old: Any, new: Any) -> None:
        setattr(place, name, new)
        if not owner:
            replace_everywhere(name, old, new)

    def uninstall(module: ModuleType) -> None:
        place = getattr(module, owner, None) if owner else module
        if place in active:
            active.discard(place)
            original, ours = patches[place]
            if vars(place)[name] is ours:
                del patches[place]
                replace(place, ours, original)

    return install, uninstall


def both(*installers: Installer) -> Installer:
    """Several pairs as one."""

    def install(module: ModuleType) -> None:
        for do, _ in installers:
            do(module)

    def uninstall(module: ModuleType) -> None:
        for _, undo in reversed(installers):
            undo(module)

    return install, uninstall


def replace_everywhere(name: str, old: object, new: object) -> None:
    """Rebinds `name` in every module that holds `old` by this name, as `from ... import name` leaves it."""
    for module in list(sys.modules.values()):
        # vars, not getattr: a lazy module would import half of its package to answer.
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)
