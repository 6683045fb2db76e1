"""A family of one's own: `register_family`, and $HF_GEM_FAMILIES for programs that know nothing of it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

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


def load_families() -> None:
    """Imports the modules in $HF_GEM_FAMILIES, names or paths of `.py` files with `os.pathsep` between them.

    Importing hf_gem does this, so that recipes, studies and the processes that they start know their families.

    Raises:
        ImportError: there is no such module or file.
    """
    for entry in filter(None, os.environ.get("HF_GEM_FAMILIES", "").split(os.pathsep)):
        path = Path(entry)
        if path.suffix != ".py":
            importlib.import_module(entry)
        elif path.stem not in sys.modules:
            found = importlib.util.spec_from_file_location(path.stem, path)
            if found is None or found.loader is None or not path.is_file():
                raise ImportError(f"HF_GEM_FAMILIES names {entry}, which is no file; give the path of a Python file")
            module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
            found.loader.exec_module(module)
