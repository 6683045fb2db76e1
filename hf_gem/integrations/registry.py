"""What the registries of both libraries need: mappings that know every well-formed name, and reversible patches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..spec import GemSpec, is_claimed, is_name, parse

# What registers with a module that has just been imported, and what takes it back.
Installer = tuple[Callable[[ModuleType], None], Callable[[ModuleType], None]]


class NameLookup(dict):
    """Mixin for a dict of activations: a missing key that is a name of the family is made on the fly.

    Subclasses set `make`. Keys that are there always win, so what the library registers itself is untouched; iteration,
    length and `get` show them only.
    """

    make: Callable[[GemSpec], Any]

    def __missing__(self, key: object) -> Any:
        if is_claimed(key):
            return type(self).make(parse(key))  # type: ignore[arg-type]  # a malformed name raises, saying the nearest
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        # A malformed name counts too: the lookup that follows explains it, which "not found" would not.
        return super().__contains__(key) or is_claimed(key)


def refuse_conflicts(registry: dict[str, Any], where: str) -> None:
    """Raises ValueError where `registry` itself holds one of our names."""
    for key in list(registry):
        if is_name(key):
            raise ValueError(
                f"{where}[{key!r}] is already {dict.get(registry, key)!r}; hf_gem does not overwrite it. "
                f"Remove it with `del {where}[{key!r}]`, then call hf_gem.register()"
            )


def method_patch(cls_name: str, name: str, wrapper: Callable[..., Any]) -> Installer:
    """The pair that makes a method call `wrapper(original, self, *args, **kwargs)` instead, and undoes it."""

    def install(module: ModuleType) -> None:
        cls = getattr(module, cls_name, None)
        original = getattr(cls, name, None)
        if original is None:
            warnings.warn(
                f"hf_gem knows {module.__name__}.{cls_name}.{name} from transformers 5.17 on and finds none here: "
                "names of the family work in every activation field, but `hidden_act` is not passed on to the field "
                "that a config reads, and a learnable eps needs to be in the checkpoint",
                stacklevel=2,
            )
        elif not hasattr(original, "_hf_gem_original"):
            setattr(cls, name, patched(original))

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return wrapper(original, self, *args, **kwargs)

        method._hf_gem_original = original  # type: ignore[attr-defined]
        return method

    def uninstall(module: ModuleType) -> None:
        cls = getattr(module, cls_name, None)
        original = getattr(getattr(cls, name, None), "_hf_gem_original", None)
        if original is not None:
            setattr(cls, name, original)

    return install, uninstall
