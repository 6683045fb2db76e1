"""Registers with other libraries: immediately if a library is already loaded, otherwise when it is imported."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import wrapt

from . import diffusers, peft, sentence_transformers, timm, transformers, vllm, weights
from .registry import Installer

# Module -> the functions that hook into it after its import, and undo that.
_LIBRARIES = (transformers, timm, peft, diffusers, sentence_transformers, vllm, weights)
_INSTALLERS: dict[str, Installer] = {}
for _library in _LIBRARIES:
    _INSTALLERS |= _library.INSTALLERS
_hooked: set[str] = set()
_active = False
_KEPT = "_hf_gem_unregister"  # an attribute of torch, which survives a new import of hf_gem


def register() -> None:
    """Makes every valid name available in transformers and timm, now or as soon as they are imported.

    Importing hf_gem calls this. Calling it again has no effect.

    Raises:
        ValueError: Something else has already registered a name of the family there. Its entry is not changed.
    """
    global _active
    # An earlier copy of hf_gem may have been imported and removed from sys.modules. Unregister it, since it does not
    # know the modules of this copy and would not save their conversions.
    before = vars(torch).get(_KEPT, unregister)
    if before is not unregister:
        before()
    setattr(torch, _KEPT, unregister)
    _active = True
    for name, (install, _) in _INSTALLERS.items():
        if name in sys.modules:
            install(sys.modules[name])
        elif name not in _hooked:
            _hooked.add(name)
            wrapt.register_post_import_hook(_on_import, name)


def unregister() -> None:
    """Undoes `register`. Models that were built before still work. Call `register()` to register again."""
    global _active
    _active = False
    for name, (_, uninstall) in _INSTALLERS.items():
        if name in sys.modules:
            uninstall(sys.modules[name])


def _on_import(module: ModuleType) -> None:
    if _active:
        _INSTALLERS[module.__name__][0](module)
