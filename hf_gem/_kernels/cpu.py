"""The C++ kernels for CPUs: finds them, builds them if that pays off, loads and launches them.

A library holds all kernels of a family for one n. A separate process builds it once per machine, into the user's cache,
and programs load it from there with ctypes. Its results equal those of the formulas bit for bit, so a program may
switch from one to the other at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor

from ..family.table import Family, family_named
from ..files import cache_folder
from . import build
from .printer import DTYPES, cpp_source, numbers
from .trust import checked, is_intact, make_private

# A build for an n starts after the formulas have processed this many elements in backward passes. That takes about a
# second, and a build takes some ten seconds of one core, once. Forward passes count less (see `dispatch`), so that a
# few inferences do not start a build.
WORTH_BUILDING = 2**26
PATIENCE = 300.0  # the longest time in seconds that a call waits for a build
LIMIT = 3600.0  # the time in seconds after which a build gives up
_PARALLEL = 2**15  # the number of elements above which several threads are faster, as for the operations of torch
NUM_TENSORS = {"forward": 2, "backward": 3, "backward_at": 3, "glu": 3, "glu_backward": 5}


# Only one thread at a time looks for a library and builds it. Threads that do not want to wait use the formulas.
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the thread that held the old one does not exist in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Library:
    """The kernels of a family for one n: loaded, being built, or unavailable."""

    def __init__(self, family: Family, n: int) -> None:
        self.family = family
        self.n = n
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] | None = None
        self._work = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._started_by = 0
        self._looked = False
        self._waited = False
        self._failed = False

    def ready(self, work: float, wait: bool) -> bool:
        """Returns whether the kernels can run now. If not, counts `work` elements, or with `wait` builds them."""
        if self._functions is not None:
            return True
        lock = _lock
        if self._failed or not lock.acquire(blocking=wait):
            return False
        try:
            return self._functions is not None or (not self._failed and self._find_or_build(work, wait))
        except (OSError, RuntimeError) as error:  # pathlib raises RuntimeError for a user without a home folder
            return self._fail(
                f"the cache folder cannot be used: {error}. Set HF_GEM_CACHE to a folder that only you can write to"
            )
        finally:
            lock.release()

    def _find_or_build(self, work: float, wait: bool) -> bool:
        if self._process is not None and self._started_by != os.getpid():
            # A forked process cannot see how a build of its parent ends, so it looks for the library itself.
            self._process, self._looked = None, False
        if not self._looked:
            self._looked = True
            if self._load() or self._failed:
                return not self._failed
        self._work += work
        if self._process is None and (wait or self._work >= WORTH_BUILDING):
            self._start()
        if self._process is None or not self._has_ended(self._process, wait):
            return False
        # Whether the library exists decides, not the exit status, since a program may have reaped all its children.
        if self._load() or self._failed:
            return not self._failed
        return self._fail(f"building the kernels failed: {self._last_words()}")

    def _has_ended(self, process: subprocess.Popen[bytes], wait: bool) -> bool:
        if wait and not self._waited:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._waited = True
                _warn(f"the kernels are still being built after {PATIENCE:g} seconds, and will be used once finished")
        return process.poll() is not None

    def function(self, operation: str, dtype: torch.dtype) -> Callable[..., None]:
        """Returns the kernel. Call this only if `ready`."""
        assert self._functions is not None
        return self._functions[operation, dtype]

    @property
    def path(self) -> Path:
        return cache_folder() / f"cpu-{self.family.name}-n{self.n}-{_fingerprint(self.family, self.n)}.so"

    def _start(self) -> None:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
            self._fail("no C++ compiler was found: install g++ or clang++, or set CXX")
            return
        if not sys.executable:  # in a program that contains Python
            self._fail("sys.executable, the Python that would build them, is not set")
            return
        folder = make_private(self.path.parent)
        if re.search(r"[\s'\"\\]", str(folder)):
            self._fail(
                f"torch cuts the compiler's command at spaces and quotes, and the cache folder is {str(folder)!r}. Set "
                "HF_GEM_CACHE to a folder without them"
            )
            return
        path = folder / self.path.name
        with tempfile.TemporaryFile(dir=folder) as source, _open(path.with_suffix(".log")) as log:
            source.write(cpp_source(self.family, self.n).encode())
            source.seek(0)
            self._started_by = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, build.__file__, str(path), str(LIMIT)],
                stdin=source,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that Ctrl-C stops the program but not the build, which takes seconds
            )

    def _last_words(self) -> str:
        log = self.path.with_suffix(".log")
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        if lines := text.splitlines():
            return f"{next((line for line in lines if 'error: ' in line), lines[-1])} (from {log})"
        return f"exit status {self._process and self._process.returncode}"

    def _load(self) -> bool:
        """Loads the library if it exists and is intact. A damaged one counts as missing and is built again."""
        if not self.path.exists():
            return False
        path = checked(self.path.parent) / self.path.name
        if not is_intact(path):
            return False
        operations = [name for name in NUM_TENSORS if name != "backward_at" or self.family.slope_at is not None]
        try:
            library = ctypes.CDLL(str(path))
            self._functions = {
                (name, dtype): _function(library, name, dtype) for name in operations for dtype in DTYPES
            }
        except (OSError, AttributeError) as error:
            return self._fail(f"{path} cannot be loaded: {error}. Delete it to build it again")
        self._process = None
        with contextlib.suppress(OSError):  # there is no log, or the folder is read-only
            path.with_suffix(".log").unlink()
        return True

    def _fail(self, reason: str) -> bool:
        self._failed = True
        _warn(reason)
        return False


def _warn(reason: str) -> None:
    warnings.warn(
        "hf_gem uses its plain formulas on the CPU, which are several times slower than its compiled kernels: "
        f"{reason}. To use the formulas without this warning, set HF_GEM_KERNELS=eager, or write "
        '`with hf_gem.kernels("eager"):`.',
        stacklevel=2,
    )


def _open(log: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(log, flags, 0o600), "wb")


def _function(library: ctypes.CDLL, operation: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library, f"{operation}_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [ctypes.c_int64, ctypes.c_int, *[ctypes.c_void_p] * (1 + NUM_TENSORS[operation])]
    function.restype = None
    return cast("Callable[..., None]", function)


@functools.cache
def _fingerprint(family: Family, n: int) -> str:
    """Returns a hash of everything that a library depends on: the source, torch, the compiler and the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        processor = platform.processor()
    parts = (
        cpp_source(family, n),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        platform.machine(),
        processor,
        os.environ.get("CXX", ""),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def library(kernels: str, n: int) -> Library:
    """Returns the one library of `Family.kernels` for an n. GEM and E-GEM share theirs."""
    return Library(family_named(kernels), n)


def launch(
    operation: str, family: Family, n: int, eps: float, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Runs one kernel. The tensors must be dense CPU tensors of the same shape, layout and dtype."""
    numel = inputs[0].numel()
    threads = torch.get_num_threads() if numel >= _PARALLEL else 1
    function = library(family.kernels, n).function(operation, inputs[0].dtype)
    pointers = [tensor.data_ptr() for tensor in (*outputs, *inputs)]
    function(numel, threads, _array(numbers(family.kernels, n, eps)), *pointers)


@functools.lru_cache(maxsize=4096)
def _array(values: tuple[float, ...]) -> ctypes.Array[ctypes.c_double]:
    """Returns numbers as kernels read them. The array of an activation is made once, not at every launch."""
    return (ctypes.c_double * len(values))(*values)
