"""`hf-gem env`: prints what a bug report needs, without tokens and the path of the home folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import redact
from .common import AsJson, show

_MORE = ("wrapt", "typer", "peft", "huggingface-hub", "safetensors", "torchvision", "matplotlib", "liger-kernel")
_VARIABLES = ("HF_GEM_", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "TORCH_COMPILE_DISABLE")


def env(as_json: AsJson = False) -> None:
    """Print versions, devices, compiler and kernels, for a bug report."""
    found = environment_facts()
    lines = []
    for section, values in found.items():
        lines.append(f"{section}:")
        lines += [f"  {name}: {_shown(value)}" for name, value in values.items()]
    show(found, "\n".join(lines), as_json)


def environment_facts() -> dict[str, dict[str, Any]]:
    """Returns section -> name -> value."""
    from .. import __file__ as package
    from ..training.environment import PACKAGES, environment

    here = environment(Path(package).parent)
    facts: dict[str, dict[str, Any]] = {
        "versions": {**here["versions"], **_more_versions(PACKAGES)},
        "hf_gem": {"folder": str(Path(package).parent), "commit": here["commit"], "changed": here["dirty"]},
        "hardware": {**here["hardware"], "driver": _first_line(_DRIVER)},
        "compiler": {"C++": _first_line([os.environ.get("CXX", "c++"), "--version"])},
        "kernels": _kernels(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)},
    }
    return {section: {name: _private(value) for name, value in values.items()} for section, values in facts.items()}


_DRIVER = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]


def _more_versions(known: Sequence[str]) -> dict[str, str]:
    from ..training.environment import versions

    return versions(*(package for package in _MORE if package not in known))


def _kernels() -> dict[str, Any]:
    """Returns which kernels this machine uses, and which C++ kernels have been built."""
    import torch

    from ..files import cache_folder

    folder = cache_folder()
    libraries = sorted(folder.glob("cpu-*.so")) if folder.is_dir() else []
    return {
        "chosen": os.environ.get("HF_GEM_KERNELS") or "auto",
        "on the CPU": "C++ kernels, once built" if shutil.which(os.environ.get("CXX", "c++")) else "plain formulas",
        "on a GPU": "Triton kernels" if torch.cuda.is_available() and _has_triton() else "none here",
        "cache": str(folder),
        "built": [path.name for path in libraries],
    }


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def _first_line(command: Sequence[str]) -> str | None:
    """Returns the first line that a program prints, or None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.partition("\n")[0].strip() or None if done.returncode == 0 else None


def _private(value: Any) -> Any:
    """Returns a value without tokens, and with `~` for the home folder."""
    if isinstance(value, str):
        home = str(Path("~").expanduser())
        return redact(value.replace(home, "~") if home != "/" else value)
    return [_private(part) for part in value] if isinstance(value, list) else value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
