"""The C++ kernels for CPUs: found, built where that pays, loaded, launched.

A library holds all kernels of a family for one n. It is built once for a machine, by a process of its own, into a cache
of the user; programs load it from there with ctypes. Its results are those of the formulas to the bit, so it does not
matter when a program changes over from one to the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
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

from ..family.formulas import cached_scale
from ..family.table import Family, family_named
from ..files import cache_folder
from . import build
from .printer import DTYPES, cpp_source
from .trust import checked, is_intact, make_private

# Elements through backward passes of the formulas before a build is started for an n: a second or so of their time,
# against some ten seconds of one core, once. Forward passes count less (`dispatch`): a few inferences never start it.
WORTH_BUILDING = 2**26
PATIENCE = 300.0  # seconds that a call waits for a build at most
LIMIT = 3600.0  # seconds after which a build ends itself
_PARALLEL = 2**15  # elements from which on several threads pay, as for the operations of torch
NUM_TENSORS = {"forward": 2, "backward": 3, "backward_at": 3, "glu": 3, "glu_backward": 5}


# One thread looks and builds at a time; those that would not wait for it go on with the formulas.
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the thread that held it is not there


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Library:
    """The kernels of a family for one n, whether they are there, being built, or not to be had."""

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
        """Whether the kernels can run now. If not, counts `work` more elements, or with `wait` builds them first."""
        if self._functions is not None:
            return True
        lock = _lock
        if self._failed or not lock.acquire(blocking=wait):
            return False
        try:
            return self._functions is not None or (not self._failed and self._find_or_build(work, wait))
        except (OSError, RuntimeError) as error:  # RuntimeError: of pathlib, where a user has no home
            return self._fail(
                f"their folder cannot be used: {error}; set HF_GEM_CACHE to one that you can write to, and nobody else"
            )
        finally:
            lock.release()

    def _find_or_build(self, work: float, wait: bool) -> bool:
        if self._process is not None and self._started_by != os.getpid():
            # A fork cannot tell how a build of its parent ends, and looks for itself.
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
        # The library tells, not the exit status, which is lost where a program collects those of all its children.
        if self._load() or self._failed:
            return not self._failed
        return self._fail(f"building them failed: {self._last_words()}")

    def _has_ended(self, process: subprocess.Popen[bytes], wait: bool) -> bool:
        if wait and not self._waited:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._waited = True
                _warn(f"they are still being built after {PATIENCE:g} seconds, and will be used once they are there")
        return process.poll() is not None

    def function(self, operation: str, dtype: torch.dtype) -> Callable[..., None]:
        """The kernel, once `ready`."""
        assert self._functions is not None
        return self._functions[operation, dtype]

    @property
    def path(self) -> Path:
        return cache_folder() / f"cpu-{self.family.name}-n{self.n}-{_fingerprint(self.family, self.n)}.so"

    def _start(self) -> None:
        if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
            self._fail("this machine has no C++ compiler: neither $CXX nor g++ nor clang++ is found")
            return
        folder = make_private(self.path.parent)
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
                start_new_session=True,  # Ctrl-C is meant for the program; the build is done in seconds
            )

    def _last_words(self) -> str:
        log = self.path.with_suffix(".log")
        text = log.read_text(encoding="utf-8", errors="replace").strip()
        if text:
            return f"{text.splitlines()[-1]} (from {log})"
        return f"exit status {self._process and self._process.returncode}"

    def _load(self) -> bool:
        """Loads the library where it is there and whole; a damaged one counts as none, and is built again."""
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
            return self._fail(f"{path} cannot be loaded: {error}; delete it to have it built again")
        self._process = None
        with contextlib.suppress(OSError):  # none there, or a folder that can only be read
            path.with_suffix(".log").unlink()
        return True

    def _fail(self, reason: str) -> bool:
        self._failed = True
        _warn(reason)
        return False


def _warn(reason: str) -> None:
    warnings.warn(
        f"hf_gem computes with its plain formulas on the CPU, several times slower than with its compiled kernels: "
        f'{reason}. HF_GEM_KERNELS=eager, or `with hf_gem.kernels("eager"):`, asks for that without this warning.',
        stacklevel=2,
    )


def _open(log: Path) -> IO[bytes]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    return os.fdopen(os.open(log, flags, 0o600), "wb")


def _function(library: ctypes.CDLL, operation: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library, f"{operation}_{str(dtype).removeprefix('torch.')}")
    numbers = [ctypes.c_int64, ctypes.c_int, ctypes.c_double, ctypes.c_double]
    function.argtypes = [*numbers, *[ctypes.c_void_p] * NUM_TENSORS[operation]]
    function.restype = None
    return cast("Callable[..., None]", function)


@functools.cache
def _fingerprint(family: Family, n: int) -> str:
    """Of all that a library depends on: the source, torch, the compiler and the processor."""
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
def _library(kernels: str, n: int) -> Library:
    return Library(family_named(kernels), n)


def library(family: Family, n: int) -> Library:
    """The library of a family for one n, always the same one; GEM and E-GEM share theirs."""
    return _library(family.kernels, n)


def launch(
    operation: str, family: Family, n: int, eps: float, outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> None:
    """Runs one kernel; the tensors are dense, of one shape, layout and dtype, and on the CPU."""
    numel = inputs[0].numel()
    threads = torch.get_num_threads() if numel >= _PARALLEL else 1
    function = _library(family.kernels, n).function(operation, inputs[0].dtype)
    pointers = [tensor.data_ptr() for tensor in (*outputs, *inputs)]
    function(numel, threads, *cached_scale(eps, n), *pointers)
