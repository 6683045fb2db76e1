"""Compiles C++ kernels: `python build.py TARGET SECONDS` reads the source from standard input.

It uses the compiler flags of Inductor. `cpu.py` runs it as a separate process, so that neither Inductor nor the
compiler slows the program down. It loads only three files of hf_gem, and torch only if there is something to build. All
files go into the folder of the target, which nobody else can write to: another user could guess and occupy Inductor's
default paths.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


def main(target: Path, source: str, seconds: float) -> None:
    """Builds a library. Kills this process if that takes longer than `seconds`, wherever it hangs."""
    from filelock import FileLock  # a dependency of torch

    trust = runpy.run_path(str(_HERE / "trust.py"))
    target = trust["make_private"](target.parent) / target.name
    lock = f"{target}.lock"
    reason = [f"after {seconds:g} seconds another process still holds {lock}"]
    watch = threading.Timer(seconds, _give_up, reason)
    watch.daemon = True
    watch.start()
    # If several processes start at once, one of them builds. The lock is released when its process exits.
    with FileLock(lock):
        reason[0] = f"the compiler had not finished after {seconds:g} seconds"
        if not trust["is_intact"](target):
            _build(target, source, trust)


def _build(target: Path, source: str, trust: dict[str, Any]) -> None:
    torch = runpy.run_path(str(_HERE.parent / "_torch.py"))
    files = runpy.run_path(str(_HERE.parent / "files.py"))
    work = target.with_suffix(".build")
    shutil.rmtree(work, ignore_errors=True)  # remains of a build that was killed
    work.mkdir(mode=0o700)
    try:
        os.environ["TMPDIR"] = str(work)
        for name in [name for name in os.environ if name.startswith("TORCHINDUCTOR_CPP_")]:
            del os.environ[name]  # these flags would change the bits, also for later programs
        library = Path(torch["compile_cpp"](source, work, trust["make_private"](target.parent / "inductor")))
        checksum = work / "sha256"
        checksum.write_text(trust["seal"](library), encoding="ascii")
        for file, place in ((checksum, trust["seal_of"](target)), (library, target)):
            files["flush"](file)
            file.replace(place)
        files["flush"](target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _give_up(reason: str) -> None:
    print(reason, flush=True)
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # kills the compiler too
    os._exit(1)


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path != str(_HERE)]  # the files here are not top-level modules
    os.umask(os.umask(0o077) | 0o022)  # files that others can write to would not be loaded
    if hasattr(os, "setsid") and os.getpgrp() != os.getpid():
        os.setsid()  # so that Ctrl-C only reaches the program, and `_give_up` only kills this process and its children
    if hasattr(os, "nice"):
        os.nice(5)
    main(Path(sys.argv[1]), sys.stdin.read(), float(sys.argv[2]))
