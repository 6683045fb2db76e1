"""Executes the runs of a study, in separate processes or in this one."""

from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import random
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState

from ..training import signals

# If possible, runs are forked from a process that has already imported what all recipes import. The imports take longer
# than a small run trains.
_CONTEXT: Any = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
IMPORTED = (
    *(f"hf_gem.training.{module}" for module in ("data.text", "data.vision", "evaluate", "loop", "report")),
    *("timm", "matplotlib.pyplot"),
    *(
        "hf_gem.compare.driver",
        "hf_gem.compare.report",
    ),  # imports of recipes/compare.py, which each process imports too
)
# Settings that a recipe may change for the whole process, each with its getter and setter.
_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
_SETTINGS: tuple[_Setting, ...] = (
    (os.getcwd, os.chdir),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_num_threads, torch.set_num_threads),
)


def environment_of(device: int) -> dict[str, str]:
    """Returns the environment variables that assign a GPU to a run, if there are GPUs."""
    if not torch.cuda.is_available():
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    return {"CUDA_VISIBLE_DEVICES": devices[device % len(devices)]}


def last_lines(log: Path) -> str:
    """Returns the end of a command's output in one line; empty if it has not started."""
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) if log.exists() else ""


class Child(Protocol):
    """A command that an executor has started, such as a `multiprocessing.Process`."""

    @property
    def exitcode(self) -> int | None:
        """The exit status, negative for a signal; None while the command runs."""

    def terminate(self) -> None:
        """Asks the command to save and stop."""


class Executor(Protocol):
    """Runs commands."""

    def start(self, command: list[str], log: Path, env: Mapping[str, str]) -> Child:
        """Starts a script.

        Args:
            command: The script and its arguments.
            log: A file for its output.
            env: Further environment variables.

        Raises:
            OSError: No process can be started.
            EOFError: The server that starts processes is gone.
        """

    def wait(self, children: Sequence[Child], seconds: float) -> None:
        """Waits until one of the commands has ended, or for some seconds. Returns at once if one has already ended."""


class Processes:
    """Runs each command in a separate process.

    Args:
        jobs: Number of commands that run at once.
    """

    def __init__(self, jobs: int) -> None:
        if not torch.cuda.is_available():  # before the first process imports torch
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
        _CONTEXT.set_forkserver_preload(list(IMPORTED))
        self._ready = False

    def start(self, command: list[str], log: Path, env: Mapping[str, str]) -> Child:
        if not self._ready:  # the first process starts after all imports
            signals.wait_for(_start_nothing, signals.STOPPED)
            self._ready = True
        process: BaseProcess = _CONTEXT.Process(target=_run_process, args=(command, log, env))
        process.start()
        return process

    def wait(self, children: Sequence[Child], seconds: float) -> None:
        wait([child.sentinel for child in children if isinstance(child, BaseProcess)], seconds)


def _start_nothing() -> None:
    """Makes the fork server do its imports. A signal may have killed a previous server that still seems alive."""
    with _interrupts_blocked():
        for pause in (0.1, 1.0, 0.0):
            process = _CONTEXT.Process(target=os.getpid, daemon=True)
            try:
                process.start()
            except (EOFError, ConnectionError):
                if not pause:
                    raise
                time.sleep(pause)
            else:
                process.join()
                return


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks SIGINT for this thread and the fork server it starts, which would print a traceback during its imports."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it starts with the server otherwise, and unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_process(command: list[str], log: Path, env: Mapping[str, str]) -> None:
    """Runs a script as the main program of this process. It saves and stops if the study's process dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to save until the recipe catches signals
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # which the fork server passes on
    with log.open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    _run_script(command, env)


def _stop_without_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _run_script(command: list[str], env: Mapping[str, str]) -> None:
    os.environ.update(env)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


class Ended:
    """A command that has ended.

    Args:
        exitcode: The exit status.
    """

    def __init__(self, exitcode: int) -> None:
        self.exitcode = exitcode

    def terminate(self) -> None:
        pass


class InProcess:
    """Runs each command to its end in this process, as soon as it is started, without starting another process.

    Afterwards, settings that it changed for the whole process are restored. Its results are bit for bit those of a
    separate process with the same number of threads.
    """

    def start(self, command: list[str], log: Path, env: Mapping[str, str]) -> Child:
        with log.open("w") as output, _output_to(output.fileno()), _restored():
            try:
                _run_script(command, env)
            except SystemExit as stop:
                if stop.code is None or isinstance(stop.code, int):
                    return Ended(stop.code or 0)
                print(stop.code, file=sys.stderr)  # as Python does at the end of a process
                return Ended(1)
            except Exception:
                traceback.print_exc()
                return Ended(1)
        return Ended(0)

    def wait(self, children: Sequence[Child], seconds: float) -> None:
        if not children:
            time.sleep(seconds)


@contextlib.contextmanager
def _output_to(descriptor: int) -> Iterator[None]:
    """Redirects standard output and error of this process and its children to an open file.

    The new streams stay open, because a log handler that is created meanwhile keeps one of them.
    """
    streams = [open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2)]  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    copies = {number: os.dup(number) for number in (1, 2)}
    signals.terminal = copies[2]
    try:
        for number in copies:
            os.dup2(descriptor, number)
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            yield
    finally:
        for stream in streams:
            stream.flush()
        signals.terminal = 2
        for number, copy in copies.items():
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """Restores, at the end, what a recipe changes for the whole process."""
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    levels: list[_Setting] = [(partial(getattr, logger, "level"), logger.setLevel) for logger in (logging.root, *known)]
    matplotlib = sys.modules.get("matplotlib")
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with contextlib.ExitStack() as stack:
        later = stack.callback
        later(setattr, sys, "argv", sys.argv)
        later(sys.path.__setitem__, slice(None), list(sys.path))
        later(_set_environment, dict(os.environ))
        later(random.setstate, random.getstate())
        later(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices))
        if matplotlib is not None:
            later(matplotlib.use, matplotlib.get_backend())
        for get, put in (*_SETTINGS, *levels):
            later(_set_back, get, put, get())
        gc.freeze()  # otherwise collections would scan all imported objects, which takes longer than some runs
        later(gc.unfreeze)
        later(gc.collect)
        later(_forget)
        _forget()
        yield


def _set_back(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> None:
    if get() != value:  # setting the number of threads changes MKL's behaviour even if the number is the same
        put(value)


def _set_environment(variables: Mapping[str, str]) -> None:
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


def _forget() -> None:
    """Drops the state that libraries keep after a run: accelerate's settings, and compiled code of old models."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.compiler.reset()  # otherwise it would give up after some models of one class
