"""Your own families: `register_family`, and $HF_GEM_FAMILIES for programs that do not import them."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch.nn.functional as F

from .._kernels import printer
from ..family.check import check
from ..family.table import FAMILIES, Family, add
from ..files import shown
from .registry import refuse_conflicts

# Module -> the registries that may already contain the name of a new family.
_REGISTRIES = {
    "transformers.activations": ("ACT2FN", "ACT2CLS"),
    "timm.layers.create_act": ("_ACT_LAYER_DEFAULT", "_ACT_FN_DEFAULT", "_ACT_LAYER_ME", "_ACT_FN_ME"),
}


def register_family(family: Family) -> Family:
    """Registers your own family of activations, which then has all the features of the built-in ones.

    You can use `<name>[_n<N>][_eps<E>][_learnable]` in transformers, timm, `get_activation` and everywhere else that
    hf_gem takes a name. The family gets kernels for CPUs and GPUs, and works in conversion, audit, recipes and
    comparison. Call this in a module that is imported before such a name is used. Registering the same family again has
    no effect.

    Args:
        family: The family. `hf_gem.family.table.Family` documents its fields, and `hf_gem.family.arithmetic` the
            arguments of its formulas.

    Returns:
        The family.

    Raises:
        TypeError: `family` is not a Family, or a formula uses an operation that kernels do not have.
        ValueError: The name is taken, `value` does not equal `exact`, or `slope` is not its derivative. The message
            says where they differ.
    """
    if not isinstance(family, Family):
        raise TypeError(
            f"got {shown(family)} of type {type(family).__name__}. register_family takes a hf_gem.Family. Build one "
            "with your formulas."
        )
    if FAMILIES.get(family.name) is family:
        return family
    if hasattr(F, family.name):
        raise ValueError(
            f"the name {shown(family.name)} is taken by torch.nn.functional.{family.name:.80}. Names must be unique. "
            "Choose another one."
        )
    if family.kernels not in (family.name, *FAMILIES):
        raise ValueError(
            f"got the family {shown(family.name)}, which uses the kernels of {shown(family.kernels)}. That family must "
            "be registered too. Call hf_gem.register_family for it first."
        )
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


def register_shipped(family: Any) -> None:
    """Registers the family that a checkpoint of `save_for_hub` ships, whose `Family` is the checkpoint's copy of ours.

    A family of this name that is registered already stays. A warning says if its definition has another text.
    """
    registered = FAMILIES.get(family.name)
    if registered is None:
        kernels = family.kernels if family.kernels in FAMILIES else ""  # its own, if the checkpoint lacks that family
        register_family(Family(**{**vars(family), "kernels": kernels}))
    elif registered.formula != family.formula:
        warnings.warn(
            f"the checkpoint was saved with the family {shown(family.formula)}, and runs with the registered family "
            f"{shown(registered.formula)}, because both are called {family.name!r}. Rename one of them if they differ.",
            stacklevel=2,
        )


def load_families() -> None:
    """Imports the modules in $HF_GEM_FAMILIES: module names or paths of `.py` files, separated by `os.pathsep`.

    Importing hf_gem calls this, so that recipes, studies and the processes that they start know your families. If the
    program is one of hf_gem, an error ends it with one line.

    Raises:
        ImportError: There is no such module or file, or it cannot be imported.
    """
    for entry in filter(None, os.environ.get("HF_GEM_FAMILIES", "").split(os.pathsep)):
        try:
            _load(entry)
        except Exception as error:
            message = (
                f"HF_GEM_FAMILIES contains {shown(entry)}, which cannot be imported ({type(error).__name__}: {error}). "
                "Entries must be Python files or modules. Correct it, or unset the variable."
            )
            if _is_our_program():  # which cannot catch an error of this import
                sys.exit(f"error: {' '.join(message.split())}")
            raise ImportError(message) from error


def _is_our_program() -> bool:
    """Returns whether this is `hf-gem` or `python -m hf_gem`."""
    program = Path(sys.argv[0]).stem if sys.argv else ""
    if program == "-m":  # of any module, while Python imports its package
        program = "".join(sys.orig_argv[-len(sys.argv) :][:1]).removeprefix("-m")  # it stands before its arguments
    return program in ("hf-gem", "hf_gem")


def _load(entry: str) -> None:
    path = Path(entry)
    if path.suffix != ".py":
        importlib.import_module(entry)
    elif path.stem not in sys.modules:
        found = importlib.util.spec_from_file_location(path.stem, path)
        assert found is not None  # since the file ends with .py
        assert found.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(found)
        try:
            found.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]  # as an import statement does
            raise
