"""Writes the kernels of the family as a package that Hugging Face's `kernels` loads from a folder or the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from .._kernels.replaceable import LAYER, PACKAGE

_ROOT = Path(__file__).parent.parent
_BACKENDS = ("cpu", "cuda", "rocm", "xpu")
_VERSION = 1  # raise it when the arguments of a layer or a function change
# Within hf_gem, these files only import each other, by relative imports.
_COPIED = (
    *("_torch.py", "files.py", "functional.py"),
    *(f"family/{name}.py" for name in ("__init__", "arithmetic", "table", "egem", "segem", "formulas", "names")),
    *(f"_kernels/{name}.py" for name in ("__init__", "dispatch", "gpu", "plain", "printer", "symbols")),
    "_kernels/triton_kernels.py",
)
_INIT = '''"""The GEM family of activation functions (arXiv 2604.21677), with Triton kernels."""

from . import layers
from .functional import activation, egem, gem, gem_glu, segem

__all__ = ["activation", "egem", "gem", "gem_glu", "layers", "segem"]
'''
_NO_CPP = '''"""This package has no C++ kernels to build. On a CPU the formulas run, which give the same bits."""


class Library:
    def ready(self, work, wait):
        return False


def library(kernels, n):
    return Library()
'''
_CARD = f"""---
library_name: kernels
license: apache-2.0
tags:
- kernels
---

# Kernels of the GEM family

The activation functions GEM, E-GEM and SE-GEM (arXiv 2604.21677) with Triton kernels for CUDA, ROCm and XPU. On a CPU
they run as plain torch. hf_gem wrote this package. Its modules, and those in its checkpoints, have the layer name
`{LAYER}`. The package needs Python 3.10 and torch 2.11 or newer.
"""


def write_kernel_package(folder: str | Path) -> list[Path]:
    """Writes a package of the family's kernels that needs no hf_gem, for `kernels.kernelize` and `kernels.get_kernel`.

    Its layer `GemActivation` replaces the forward of hf_gem's modules, and of those in a checkpoint of `save_for_hub`
    that was loaded without hf_gem. Otherwise those run as plain torch, in several passes over memory. Modules with a
    learnable eps keep their forward.

    Args:
        folder: The folder, created if needed. Use it with `kernels.LocalLayerRepository`, or upload it as a kernel
            repository.

    Returns:
        The files written.
    """
    folder = Path(folder)
    files = _files()
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in sorted(files.items())).encode()).hexdigest()
    written = {folder / "README.md": _CARD}
    for backend in _BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        written |= {variant / name: text for name, text in files.items()}
        written[variant / "metadata.json"] = json.dumps(_metadata(backend, digest[:12], files), indent=2) + "\n"
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())  # the line endings of the digest, on every system
    return list(written)


def _files() -> dict[str, str]:
    """Returns path in a variant -> text. Most are copies of files of hf_gem; the C++ kernels are left out."""
    layers = Path(__file__).with_name("kernel_layers.py").read_text(encoding="utf-8")
    return {
        "__init__.py": _INIT,
        "layers.py": layers.replace("from ..functional", "from .functional"),
        "_kernels/cpu.py": _NO_CPP,
        **{name: (_ROOT / name).read_text(encoding="utf-8") for name in _COPIED},
    }


def _metadata(backend: str, unique: str, files: dict[str, str]) -> dict[str, object]:
    """Returns the content of a variant's metadata.json. The package is imported under its id."""
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for name, text in files.items()}
    return {
        "id": f"{PACKAGE}{backend}_{unique}",
        "name": "hf-gem",
        "version": _VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": dict(sorted(digests.items()))},
    }
