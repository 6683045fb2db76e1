"""Tools for hooking into libraries: registries that know every valid name, and reversible patches."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import Any, TypeVar

from ..family.names import GemSpec, is_claimed, is_name, parse
from ..files import shown

T = TypeVar("T")
# A function that hooks into a module that has just been imported, and one that undoes it.
Installer = tuple[Callable[[ModuleType], None], Callable[[ModuleType], None]]


class NameLookup(dict[str, Any]):
    """Mixin for a dict of activations. It creates the entry for a name of the family when the name is looked up.

    Subclasses set `make`. Existing keys always win, so the library's own entries do not change. Iteration and length
    only cover existing keys.
    """

    make: Callable[[GemSpec], Any]

    def __missing__(self, key: object) -> Any:
        if is_claimed(key):
            return type(self).make(parse(key))  # for a malformed name, the error names the nearest valid one
        raise KeyError(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return (
            type(self).make(parse(key))
            if not super().__contains__(key) and is_claimed(key)
            else super().get(key, default)
        )

    def __contains__(self, key: object) -> bool:
        # A malformed name counts too, because the lookup that follows explains the problem better than "not found".
        return super().__contains__(key) or is_claimed(key)


def refuse_conflicts(registry: dict[str, Any], where: str) -> None:
    """Raises ValueError if `registry` itself contains a name of the family."""
    for key in list(registry):
        if is_name(key):
            raise ValueError(
                f"{where}[{shown(key)}] is already {shown(dict.get(registry, key))}. hf_gem does not overwrite it. "
                f"Remove it with `del {where}[{shown(key)}]`, then import hf_gem again."
            )


def lookups(where: str, dicts: dict[str, type[NameLookup]], beside: tuple[str, ...] = ()) -> Installer:
    """Returns functions that replace dicts of the module `where` by lookups, and that undo it.

    Replacing raises ValueError if these dicts, or those in `beside`, already contain a name of the family.
    """

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
    """Returns functions that make `function` or `Class.method` of a module call `wrapper(original, ...)`, and undo it.

    The arguments of the call follow `original`, with `self` for a method and the class for a class method. A function
    is replaced in every module that imported it. `lost` tells the user what does not work if the library does not have
    the function.
    """
    owner, _, name = path.rpartition(".")
    patches: dict[Any, tuple[Any, Any]] = {}  # module or class -> original, ours
    active: set[Any] = set()

    def install(module: ModuleType) -> None:
        place = getattr(module, owner, None) if owner else module
        original = vars(place).get(name) if place is not None else None
        if original is None:
            missing = f"{module.__name__}.{path}"
            warnings.warn(f"hf_gem did not find {missing} in the installed version: {lost}", stacklevel=2)
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
            return function(*args, **kwargs)  # uninstalled, but someone else still holds or wraps this function

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
    """Combines several installers into one."""

    def install(module: ModuleType) -> None:
        for do, _ in installers:
            do(module)

    def uninstall(module: ModuleType) -> None:
        for _, undo in reversed(installers):
            undo(module)

    return install, uninstall


@contextlib.contextmanager
def holding(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Gives a context variable a value in a `with` block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def replace_everywhere(name: str, old: object, new: object) -> None:
    """Rebinds `name` in every module where it is `old`, which includes modules that ran `from ... import name`."""
    for module in list(sys.modules.values()):
        # Uses vars instead of getattr, for which a lazy module would import half of its package.
        if isinstance(module, ModuleType) and vars(module).get(name) is old:
            setattr(module, name, new)
