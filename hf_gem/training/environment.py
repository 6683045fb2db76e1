"""Command, commit, versions and hardware of this process: what a record keeps, and what a bug report needs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..files import redact

PACKAGES = ("hf-gem", "transformers", "accelerate", "datasets", "tokenizers", "timm", "triton", "numpy")


def environment(folder: Path | None = None) -> dict[str, Any]:
    """Command, commit, versions and hardware of this process.

    Args:
        folder: Of the code whose commit is meant; by default that of the script.
    """
    return {
        "command": command(),
        **_commit(folder or Path(sys.argv[0]).resolve().parent),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build, which the package's metadata leaves out
            **versions(*PACKAGES),
        },
        "hardware": hardware(),
    }


def command() -> str:
    """Returns the command as it would be typed in the current folder, without secrets and flags of the launcher."""
    script = Path(sys.argv[0])
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    run = ["-m", module.name] if module is not None and module.name.startswith("hf_gem.") else [str(script)]
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # which every launcher of accelerate sets, torchrun's beside it
        launcher = ["accelerate", "launch"]
    return redact(shlex.join([*launcher, *run, *sys.argv[1:]]))


def hardware() -> dict[str, Any]:
    """Processor, number of threads and accelerators."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def versions(*packages: str) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _commit(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            # In a session of its own: a Ctrl-C here must not leave a record without its commit.
            command = ["git", "-C", str(folder), *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=False, start_new_session=True
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files"):  # no repository, or one that has nothing to do with it, above an installed package
        return {"commit": None, "dirty": None, "diff_hash": None}
    status, changes = git("status", "--porcelain"), git("diff", "HEAD")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "diff_hash": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
