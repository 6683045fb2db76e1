"""When registration happens: at once for a library that is loaded, at its import for one that is not."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
import wrapt

from . import diffusers, peft, sentence_transformers, timm, transformers, vllm, weights
from .registry import Installer

# The module that, once imported, makes a registration possible -> what to do and undo. One row for each place we hook.
_LIBRARIES = (transformers, timm, peft, diffusers, sentence_transformers, vllm, weights)
_INSTALLERS: dict[str, Installer] = {}
for _library in _LIBRARIES:
    _INSTALLERS |= _library.INSTALLERS
_hooked: set[str] = set()
_active = False
_KEPT = "_hf_gem_unregister"  # an attribute of torch, which stays where hf_gem is imported anew


def register() -> None:
    """Makes every well-formed name available in transformers and timm, now or as soon as they are imported.

    Importing hf_gem does this. Calling it again changes nothing.

    Raises:
        ValueError: a name of the family is already registered there by something else, which is left as it is.
    """
    global _active
    # A copy of hf_gem that was imported before, and taken out of sys.modules since, hands over: it would not know the
    # modules of this one, and write no conversion into what is saved.
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
    """Takes all of it back; models already built go on working. `register()` brings it back."""
    global _active
    _active = False
    for name, (_, uninstall) in _INSTALLERS.items():
        if name in sys.modules:
            uninstall(sys.modules[name])


def _on_import(module: ModuleType) -> None:
    if _active:
        _INSTALLERS[module.__name__][0](module)
