"""Compiles the C++ kernels: `python build.py N TARGET`, with the flags that Inductor uses on this machine.

`cpu.py` starts it as a process of its own, so that neither Inductor nor the compiler slows the program down. Nothing of
hf_gem is imported, and torch only where there is something to build.
"""

import os
import shutil
import sys
from pathlib import Path


def source(n: int) -> str:
    return f"#define GEM_N {n}\n" + Path(__file__).with_name("cpu.cpp").read_text(encoding="utf-8")


def main(n: int, target: Path) -> None:
    from filelock import FileLock  # which torch depends on

    target.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that start at once, one builds; the lock goes with the process that holds it.
    with FileLock(f"{target}.lock"):
        if target.exists():
            return
        from torch._inductor.codecache import CppCodeCache

        library = CppCodeCache.load(source(n))
        unfinished = target.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library._name, unfinished)
        os.replace(unfinished, target)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose files are no modules of their own
    if hasattr(os, "nice"):
        os.nice(5)
    main(int(sys.argv[1]), Path(sys.argv[2]))
