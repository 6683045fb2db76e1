"""A family of one's own: `register_family`."""

from __future__ import annotations

import sys

import torch.nn.functional as F

from .._kernels import printer
from ..family.check import check
from ..family.table import FAMILIES, Family, add
from .registry import refuse_conflicts

# Where a name of a stock activation could stand already: module -> its registries.
_REGISTRIES = {
    "transformers.activations": ("ACT2FN", "ACT2CLS"),
    "timm.layers.create_act": ("_ACT_LAYER_DEFAULT", "_ACT_FN_DEFAULT", "_ACT_LAYER_ME", "_ACT_FN_ME"),
}


def register_family(family: Family) -> Family:
    """Gives a family of activations everything that ours have.

    From then on, `<name>[_n<N>][_eps<E>][_learnable]` names its members in transformers, timm, `get_activation` and
    wherever else hf_gem takes a name, with kernels for CPUs and GPUs, conversion, audit, recipes and comparison. Call
    it in a module that is imported before such a name is used. Registering the same family again changes nothing.

    Args:
        family: See `hf_gem.family.table.Family` for what it says, `hf_gem.family.arithmetic` for what formulas take.

    Returns:
        The family.

    Raises:
        TypeError: a formula uses an operation that kernels do not have.
        ValueError: the name is taken, or the family contradicts itself: `value` is not `exact`, or `slope` not its
            derivative; the message says where.
    """
    if FAMILIES.get(family.name) is family:
        return family
    if hasattr(F, family.name):
        raise ValueError(f"the name {family.name!r} is taken by torch.nn.functional.{family.name}; choose another")
    check(family)
    for n in (1, 2):
        printer.check(family, n)
    add(family)
    try:
        for name, registries in _REGISTRIES.items():
            module = sys.modules.get(name)
            for registry in registries if module is not None else ():
                refuse_conflicts(getattr(module, registry), f"{name}.{registry}")
    except ValueError:
        del FAMILIES[family.name]
        raise
    return family
