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
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..family.formulas import cached_scale
from ..family.table import Family, family_named
from ..files import cache_folder
from . import build
from .printer import DTYPES, cpp_source

# Elements through backward passes of the formulas before a build is started for an n: a second or so of their time,
# against some ten seconds of one core, once. Forward passes count less (`dispatch`): a few inferences never start it.
WORTH_BUILDING = 2**26
_PARALLEL = 2**15  # elements from which on several threads pay, as for the operations of torch
NUM_TENSORS = {"forward": 2, "backward": 3, "backward_at": 3, "glu": 3, "glu_backward": 5}


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
        self._failed = False

    def ready(self, work: float, wait: bool) -> bool:
        """Whether the kernels can run now. If not, counts `work` more elements, or with `wait` builds them first."""
        if self._functions is not None:
            return True
        if self._failed:
            return False
        try:
            return self._find_or_build(work, wait)
        except (OSError, RuntimeError) as error:  # RuntimeError: of pathlib, where a user has no home
            return self._fail(f"their folder cannot be used: {error}; set HF_GEM_CACHE to one that can be written")

    def _find_or_build(self, work: float, wait: bool) -> bool:
        if self._process is not None and self._started_by != os.getpid():
            # A fork cannot tell how a build of its parent ends, and looks for itself.
            self._process, self._looked = None, False
        if not self._looked:
            self._looked = True
            if self.path.exists():
                return self._load()
        self._work += work
        if self._process is None and (wait or self._work >= WORTH_BUILDING):
            self._start()
        if self._process is None or (not wait and self._process.poll() is None):
            return False
        self._process.wait()
        # The library tells, not the exit status, which is lost where a program collects those of all its children.
        if self.path.exists():
            return self._load()
        return self._fail(f"building them failed: {self._last_words()}")

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
        log = self.path.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started_by = os.getpid()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, build.__file__, str(self.path)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is meant for the program; the build is done in seconds
            )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as source:  # it ended, and its log says why
            source.write(cpp_source(self.family, self.n).encode())

    def _last_words(self) -> str:
        text = self.path.with_suffix(".log").read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1] if text else f"exit status {self._process and self._process.returncode}"

    def _load(self) -> bool:
        try:
            library = ctypes.CDLL(str(self.path))
        except OSError as error:
            return self._fail(f"{self.path} cannot be loaded: {error}; delete it to have it built again")
        with contextlib.suppress(OSError):  # none there, or a folder that can only be read
            self.path.with_suffix(".log").unlink()
        operations = [name for name in NUM_TENSORS if name != "backward_at" or self.family.slope_at is not None]
        self._functions = {(name, dtype): _function(library, name, dtype) for name in operations for dtype in DTYPES}
        return True

    def _fail(self, reason: str) -> bool:
        self._failed = True
        warnings.warn(
            f"hf_gem computes with its plain formulas on the CPU, several times slower than with its compiled kernels: "
            f'{reason}. HF_GEM_KERNELS=eager, or `with hf_gem.kernels("eager"):`, asks for that without this warning.',
            stacklevel=2,
        )
        return False


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
