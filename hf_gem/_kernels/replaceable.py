"""What the package kernels of Hugging Face may replace in an activation, and has; see `integrations/kernels.py`."""

from __future__ import annotations

import sys
from typing import Any

LAYER = "GemActivation"  # in mappings of kernels
PACKAGE = "_hf_gem_"  # what the module names of the packages begin with
_FAMILIES = ("gem", "egem", "segem")  # in every package that `write_kernel_package` has written


def kernel_condition(module: Any) -> bool:
    """Whether `kernels.kernelize` may replace the forward of a module of the family.

    It may not for a learnable eps, which the layer would need as a tensor, and for families of your own, which the
    package does not hold. Without a mapping for the layer it may not either: it would only warn, once for each module.
    """
    mapping = getattr(sys.modules.get("kernels.layer.globals"), "_KERNEL_MAPPING", None)
    if mapping is not None and LAYER not in mapping.get():
        return False
    return module.log_ratio is None and module.family in _FAMILIES


def is_replaced(module: Any) -> bool:
    """Whether the forward of a module of the family comes from a package that `write_kernel_package` has written."""
    return getattr(vars(module).get("forward"), "__module__", "").startswith(PACKAGE)
