"""Compiles C++ kernels: `python build.py TARGET SECONDS`, with the source on standard input and the flags of Inductor.

`cpu.py` starts it as a process of its own, so that neither Inductor nor the compiler slows the program down. Nothing of
hf_gem is imported but three files, and torch only where there is something to build. All files are in the folder of the
target, which nobody else can write to: the default ones of Inductor have names that another user can guess and take.
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
    """Builds a library, and ends this process where that takes more than some seconds, whatever it hangs in."""
    from filelock import FileLock  # which torch depends on

    trust = runpy.run_path(str(_HERE / "trust.py"))
    target = trust["make_private"](target.parent) / target.name
    lock = f"{target}.lock"
    reason = [f"after {seconds:g} seconds another process still holds {lock}"]
    watch = threading.Timer(seconds, _give_up, reason)
    watch.daemon = True
    watch.start()
    # Of several processes that start at once, one builds; the lock goes with the process that holds it.
    with FileLock(lock):
        reason[0] = f"the compiler had not finished after {seconds:g} seconds"
        if not trust["is_intact"](target):
            _build(target, source, trust)


def _build(target: Path, source: str, trust: dict[str, Any]) -> None:
    torch = runpy.run_path(str(_HERE.parent / "_torch.py"))
    files = runpy.run_path(str(_HERE.parent / "files.py"))
    work = target.with_suffix(".build")
    shutil.rmtree(work, ignore_errors=True)  # left behind by a build that was killed
    work.mkdir(mode=0o700)
    try:
        os.environ["TMPDIR"] = str(work)
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
        os.killpg(0, signal.SIGKILL)  # the compiler too
    os._exit(1)


if __name__ == "__main__":
    sys.path[:] = [path for path in sys.path if path != str(_HERE)]  # its files are no modules of their own
    os.umask(os.umask(0o077) | 0o022)  # what others can write to is not loaded
    if hasattr(os, "setsid") and os.getpgrp() != os.getpid():
        os.setsid()  # Ctrl-C is meant for the program, and `_give_up` for this process and what it has started
    if hasattr(os, "nice"):
        os.nice(5)
    main(Path(sys.argv[1]), sys.stdin.read(), float(sys.argv[2]))
