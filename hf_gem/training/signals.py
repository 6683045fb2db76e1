"""SIGINT and SIGTERM: a handler sets a flag, and the code that loops or waits looks at it and stops by itself.

An exception out of a signal handler may hit anywhere, inside a library that holds a lock too, and that lock is then
held for ever. Here, `Interrupted` is raised by `check`, and only where the caller can stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import torch

from ..files import redact
from .errors import Interrupted, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
_LOOK_EVERY = 0.2  # seconds
_active: Caught | None = None
terminal = 2  # the descriptor for an answer to Ctrl-C; another one while 2 goes to a file


@dataclass
class Caught:
    """What a guard has caught.

    Attributes:
        number: The signal that asked to stop, or None. Code that learns of a stop by other means sets it too.
    """

    number: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self.number is not None

    def raise_if_requested(self, message: str = "stopped; the same command goes on") -> None:
        """Raises `Interrupted` with the given message if a stop was asked for."""
        if self.number is not None:
            raise Interrupted(message, self.number)


@contextlib.contextmanager
def catch_signals() -> Iterator[Caught]:
    """Collects SIGINT and SIGTERM while the block runs.

    The first one sets `number` and changes nothing else. A second SIGINT acts at once, as it does without the guard:
    it raises KeyboardInterrupt. A second SIGTERM is ignored, since launchers pass on the one that processes of their
    group have already received.

    Inside another guard this is that guard, so what was asked for there holds here. Python delivers signals to the
    main thread alone; in another thread the guard catches nothing.
    """
    global _active
    if _active is not None:
        yield _active
        return
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.number = caught.number or number
        if number == signal.SIGINT:
            signal.signal(number, previous[signal.SIGINT] or signal.default_int_handler)
            with contextlib.suppress(OSError):  # not by print, which may have been interrupted half-way
                os.write(terminal, b"\nstopping as soon as possible; press Ctrl-C again to stop at once\n")

    _active = caught
    try:
        for number in previous:
            signal.signal(number, handle)
        yield caught
    finally:
        _active = None
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def check(message: str = "stopped; the same command goes on") -> None:
    """Raises `Interrupted` if the active guard was asked to stop. Any thread may call it, with or without a guard.

    Args:
        message: What was saved and how to go on.
    """
    if _active is not None:
        _active.raise_if_requested(message)


def wait_for(call: Callable[[], T], message: str) -> T:
    """The result of a call that may block for long, made in a thread, while this one looks whether a signal arrives.

    Without a guard, or in another thread than the main one, it is a plain call.

    Args:
        call: What blocks. When a signal arrives it is left behind, in a thread that does not keep the process alive.
        message: What was saved and how to go on.

    Raises:
        Interrupted: a signal arrived before the result.
    """
    if _active is None or threading.current_thread() is not threading.main_thread():
        return call()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised again below
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_LOOK_EVERY)
        check(message)
    return future.result()


def agreed_stop(accelerator: Accelerator) -> int | None:
    """The signal to stop for, or None: the same on all processes, which all call this at the same point.

    A file named by $HF_GEM_STOP_FILE stands for SIGTERM: launchers kill half a minute after they pass that on. With
    several processes this waits for the device.
    """
    number = _active.number if _active is not None else None
    file = os.environ.get("HF_GEM_STOP_FILE")
    if number is None and file and accelerator.is_main_process and Path(file).exists():
        number = signal.SIGTERM
    if accelerator.num_processes == 1:
        return number
    flag = torch.tensor(float(number is not None), device=accelerator.device)
    return (number or signal.SIGTERM) if accelerator.reduce(flag, "sum") else None


def run_recipe(main: Callable[[], None]) -> None:
    """Runs a recipe as a script, under a guard: an error that a person can fix ends it with one line and a status.

    Nothing that it raises shows a secret of the command line.
    """
    try:
        with catch_signals():
            main()
    except TrainingError as error:
        print(f"{'' if isinstance(error, Interrupted) else 'error: '}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception:
        shown = redact(text := traceback.format_exc())
        if shown == text:
            raise
        print(shown, file=sys.stderr)  # as Python would, but for the secrets
        sys.exit(1)
