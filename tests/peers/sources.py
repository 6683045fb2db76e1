"""Fetches the test suites of the installed transformers and timm, which their wheels leave out."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# Of transformers' suite, the source distribution lacks these; what is inherited from them is not run.
_MISSING = {
    "tests/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
_NEEDS = ("parameterized",)  # of transformers' suite, and of nothing else here


def fetch(library: str, folder: Path) -> Path:
    """The unpacked source distribution of the installed version of a library; from PyPI where it is not there yet.

    Args:
        library: `transformers` or `timm`.
        folder: Where to keep it; beside it, in `needs`, what the suites import.
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
