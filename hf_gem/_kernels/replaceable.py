"""Checks whether Hugging Face's package `kernels` may replace an activation, or has; see `integrations/kernels.py`."""

from __future__ import annotations

import sys
from typing import Any

LAYER = "GemActivation"  # the name of the layer in mappings of kernels
PACKAGE = "_hf_gem_"  # the prefix of the packages' module names
BUILT_IN = ("gem", "egem", "segem")  # in every package that `write_kernel_package` writes


def kernel_condition(module: Any) -> bool:
    """Returns whether `kernels.kernelize` may replace the forward of a module of the family.

    It may not if eps is learnable, which the layer would need as a tensor, or for your own families, which the package
    does not contain. It may not without a mapping for the layer either: it would only warn, once for each module.
    """
    mapping = getattr(sys.modules.get("kernels.layer.globals"), "_KERNEL_MAPPING", None)
    if mapping is not None and LAYER not in mapping.get():
        return False
    return module.log_ratio is None and module.family in BUILT_IN


def is_replaced(module: Any) -> bool:
    """Returns whether the forward of a module of the family comes from a package of `write_kernel_package`."""
    return getattr(vars(module).get("forward"), "__module__", "").startswith(PACKAGE)
