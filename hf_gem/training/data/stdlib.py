"""The source of Python's own library, a corpus that needs no download."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path


def stdlib_files() -> list[tuple[str, Path]]:
    """Lists the modules of the running Python's standard library by name, without tests.

    Generated modules are left out: build records, and pydoc's help texts, which are 7 % of the source in one file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
    files: dict[str, Path] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - skipped  # looking into installed packages would take most of the time
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        files |= {path.relative_to(root).as_posix(): path for path in paths}
    return [(name, files[name]) for name in sorted(files) if not name.startswith(("_sysconfigdata", "config-"))]
