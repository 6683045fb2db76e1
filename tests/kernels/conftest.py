"""A machine where nothing was ever built, and builds that take no time."""

import shutil
from types import SimpleNamespace

import pytest

from hf_gem._kernels import cpu
from hf_gem.family.egem import EGEM


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As on a machine where nothing was ever built."""
    monkeypatch.setenv("HF_GEM_CACHE", str(tmp_path / "cache"))
    cpu.library.cache_clear()
    yield tmp_path / "cache"
    cpu.library.cache_clear()


@pytest.fixture
def quick_build(request, monkeypatch, tmp_path):
    """`fresh`, and a build of E-GEM with n = 1 that copies what was built before.

    Returns a file that gets a line for each build, with its process.
    """
    library = cpu.Library(EGEM, 1)
    assert library.ready(0, wait=True)
    for end in ("", ".sha256"):
        shutil.copyfile(f"{library.path}{end}", tmp_path / f"original{end}")
    script, starts = tmp_path / "copies.py", tmp_path / "starts.txt"
    starts.write_text("")
    script.write_text(
        f"""import os, shutil, sys
with open({str(starts)!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
for end in ("", ".sha256"):
    shutil.copyfile({str(tmp_path / "original")!r} + end, sys.argv[1] + ".new")
    os.chmod(sys.argv[1] + ".new", 0o600)
    os.replace(sys.argv[1] + ".new", sys.argv[1] + end)
"""
    )
    monkeypatch.setattr(cpu, "build", SimpleNamespace(__file__=str(script)))
    request.getfixturevalue("fresh")
    return starts
