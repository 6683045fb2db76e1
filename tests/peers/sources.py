"""Fetches the test suites of the installed transformers and timm, which their wheels leave out."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# The source distribution of transformers lacks these. Tests inherited from them are not run.
_MISSING = {
    "tests/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
_NEEDS = ("parameterized",)  # only transformers' suite needs these


def fetch(library: str, folder: Path) -> Path:
    """Returns the unpacked source distribution of the installed version of a library. Fetches it from PyPI if needed.

    Args:
        library: `transformers` or `timm`.
        folder: Folder for it. The subfolder `needs` gets what the suites import.
    """
    number = version(library)
    source = folder / f"{library}-{number}"
    if not source.exists():
        _pip("download", "--no-deps", "--no-binary", library, "--dest", folder, f"{library}=={number}")
        with tarfile.open(folder / f"{library}-{number}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    if library == "transformers":
        for name, text in _MISSING.items():
            path = source / name
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
    if not (folder / "needs").exists():
        _pip("install", "--no-deps", "--target", folder / "needs", *_NEEDS)
    return source


def _pip(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", arguments[0], "--quiet", *map(str, arguments[1:])], check=True)
