"""The GEM family of activation functions, for torch, transformers and timm.

Importing this package registers every name of the family (`gem_n2`, `egem`, `segem_eps0.01` ...) in transformers and
timm. It does not matter which of them you import first.
"""

import importlib
import os
from typing import TYPE_CHECKING

from .integrations import register, unregister

if TYPE_CHECKING:
    from ._kernels import kernels
    from .family.names import GemSpec, parse
    from .family.table import Family
    from .functional import activation, egem, gem, segem
    from .init import gain
    from .integrations.families import register_family
    from .integrations.hub import save_for_hub
    from .integrations.onnx import activation_nodes
    from .integrations.timm import create_timm_model
    from .modules import EGEM, GEM, SEGEM, GemActivation, get_activation
    from .surgery.audit import Audit, audit
    from .surgery.convert import Conversion, convert, revert
    from .surgery.fields import set_activation
    from .surgery.glu import GluPatch, patch_glu, unpatch_glu

__version__ = "0.1.0"

__all__ = [
    "EGEM",
    "GEM",
    "SEGEM",
    "Audit",
    "Conversion",
    "Family",
    "GemActivation",
    "GemSpec",
    "GluPatch",
    "activation",
    "activation_nodes",
    "audit",
    "convert",
    "create_timm_model",
    "egem",
    "gain",
    "gem",
    "get_activation",
    "kernels",
    "parse",
    "patch_glu",
    "register",
    "register_family",
    "revert",
    "save_for_hub",
    "segem",
    "set_activation",
    "unpatch_glu",
    "unregister",
]

# What is imported when it is first used, so that `hf-gem --help` and completion do not wait for torch.
_SUBMODULES = ("_kernels", "_torch", "family", "files", "fit", "functional", "init", "modules", "surgery")
_NAMES = {
    "_kernels": ("kernels",),
    "family.names": ("GemSpec", "parse"),
    "family.table": ("Family",),
    "functional": ("activation", "egem", "gem", "segem"),
    "init": ("gain",),
    "integrations.families": ("register_family",),
    "integrations.hub": ("save_for_hub",),
    "integrations.onnx": ("activation_nodes",),
    "integrations.timm": ("create_timm_model",),
    "modules": ("EGEM", "GEM", "SEGEM", "GemActivation", "get_activation"),
    "surgery.audit": ("Audit", "audit"),
    "surgery.convert": ("Conversion", "convert", "revert"),
    "surgery.fields": ("set_activation",),
    "surgery.glu": ("GluPatch", "patch_glu", "unpatch_glu"),
}

if not TYPE_CHECKING:  # a type checker would take any attribute for one that this function finds

    def __getattr__(name):
        if name in _SUBMODULES:
            return importlib.import_module(f".{name}", __name__)
        for module, names in _NAMES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(f".{module}", __name__), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES, *__all__})


register()
if os.environ.get("HF_GEM_FAMILIES"):
    from .integrations.families import load_families

    load_families()
