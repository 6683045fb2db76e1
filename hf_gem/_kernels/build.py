"""Compiles C++ kernels: `python build.py TARGET`, with the source on standard input and the flags of Inductor.

`cpu.py` starts it as a process of its own, so that neither Inductor nor the compiler slows the program down. Nothing of
hf_gem is imported but one file, and torch only where there is something to build.
"""

import os
import runpy
import shutil
import sys
from pathlib import Path


def main(target: Path, source: str) -> None:
    from filelock import FileLock  # which torch depends on

    target.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that start at once, one builds; the lock goes with the process that holds it.
    with FileLock(f"{target}.lock"):
        if target.exists():
            return
        private = runpy.run_path(str(Path(__file__).parent.parent / "_torch.py"))
        unfinished = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(private["compile_cpp"](source), unfinished)
        unfinished.replace(target)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files are no modules of their own
    if hasattr(os, "nice"):
        os.nice(5)
    main(Path(sys.argv[1]), sys.stdin.read())
