"""Registers with other libraries: immediately if a library is already loaded, otherwise when it is imported."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import wrapt

if TYPE_CHECKING:
    from .registry import Installer

# Library -> the files that hook into it. They import torch, so they wait for the library, which imports it anyway.
_FILES = {
    "transformers": ("transformers", "peft"),
    "timm": ("timm",),
    "peft": ("peft",),
    "diffusers": ("diffusers",),
    "sentence_transformers": ("sentence_transformers",),
    "vllm": ("vllm",),
    "safetensors.torch": ("weights",),
    "lightning.pytorch": ("weights",),
    "pytorch_lightning": ("weights",),
}
# Module of a library -> the functions that hook into it after its import, and undo that.
_INSTALLERS: dict[str, Installer] = {}
_hooked: set[str] = set()
_active = False
_KEPT = "_hf_gem_unregister"  # an attribute of wrapt, which survives a new import of hf_gem


def register() -> None:
    """Makes every valid name available in transformers and timm, now or as soon as they are imported.

    Importing hf_gem calls this. Calling it again has no effect.

    Raises:
        ValueError: Something else has already registered a name of the family there. Its entry is not changed.
    """
    global _active
    # An earlier copy of hf_gem may have been imported and removed from sys.modules. Unregister it, since it does not
    # know the modules of this copy and would not save their conversions.
    before = vars(wrapt).get(_KEPT, unregister)
    if before is not unregister:
        before()
    setattr(wrapt, _KEPT, unregister)
    _active = True
    for library in _FILES:
        _after_import(library, _on_library)


def unregister() -> None:
    """Undoes `register`. Models that were built before still work. Call `register()` to register again."""
    global _active
    _active = False
    for name, (_, uninstall) in _INSTALLERS.items():
        if name in sys.modules:
            uninstall(sys.modules[name])


def _after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    if (module := sys.modules.get(name)) is not None:
        function(module)
    elif name not in _hooked:
        _hooked.add(name)
        wrapt.register_post_import_hook(function, name)


def _on_library(library: ModuleType) -> None:
    if _active:
        for file in _FILES[library.__name__]:
            installers = importlib.import_module(f".{file}", __package__).INSTALLERS
            _INSTALLERS.update(installers)
            for name in installers:
                _after_import(name, _on_module)


def _on_module(module: ModuleType) -> None:
    if _active:
        _INSTALLERS[module.__name__][0](module)
