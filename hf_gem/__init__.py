"""The GEM family of activation functions, for torch, transformers and timm.

Importing this package registers every name of the family (`gem_n2`, `egem`, `segem_eps0.01` ...) in transformers and
timm. It does not matter which of them you import first.
"""

from ._kernels import kernels
from .family.names import GemSpec, parse
from .family.table import Family
from .functional import activation, egem, gem, segem
from .init import gain
from .integrations import register, unregister
from .integrations.families import load_families, register_family
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

register()
load_families()
