"""Handles SIGINT and SIGTERM: a handler sets a flag, and code that loops or waits checks the flag and stops.

A signal handler that raises can interrupt any code, including a library that holds a lock, and that lock would never be
released. Here, only `check` raises `Interrupted`, at points where the caller can stop.
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
STOPPED = "stopped; run the same command again to continue"
LOOK_EVERY = 0.2  # seconds between two checks while something is waited for
_active: Caught | None = None
terminal = 2  # the descriptor for the answer to Ctrl-C; it changes while 2 is redirected to a file


@dataclass
class Caught:
    """The signal that a guard has caught.

    Attributes:
        number: The signal that requested a stop, or None. Code that learns of a stop in another way may set it.
    """

    number: int | None = None


@contextlib.contextmanager
def catch_signals() -> Iterator[Caught]:
    """Collects SIGINT and SIGTERM while the block runs.

    The first signal only sets `number`. A second SIGINT acts at once, as without the guard: it raises
    KeyboardInterrupt. A second SIGTERM is ignored, because launchers pass on a SIGTERM that the processes of their
    group have already received.

    A guard inside another guard is the outer one, so a stop requested there also holds here. Python delivers signals
    only to the main thread. In another thread the guard catches nothing.
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
            with contextlib.suppress(OSError):  # not with print, which the signal may have interrupted
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


def check(message: str = STOPPED) -> None:
    """Raises `Interrupted` if the active guard was asked to stop. Any thread may call it, with or without a guard.

    Args:
        message: What was saved, and how to continue.
    """
    guard = _active  # read once: another thread may leave the guard meanwhile
    if guard is not None and guard.number is not None:
        raise Interrupted(message, guard.number)


def wait_for(call: Callable[[], T], message: str) -> T:
    """Runs a call that may block for long in a thread, watches for signals meanwhile, and returns its result.

    Without a guard, or outside the main thread, it is a plain call.

    Args:
        call: The call that may block. When a signal arrives, it keeps running in a daemon thread, which does not keep
            the process alive.
        message: What was saved, and how to continue.

    Raises:
        Interrupted: A signal arrived before the result.
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
        thread.join(LOOK_EVERY)
        check(message)
    return future.result()


def agreed_stop(accelerator: Accelerator) -> int | None:
    """Returns the signal to stop for, or None; the same on all processes. All must call it at the same point.

    If the file named by $HF_GEM_STOP_FILE exists, that counts as a SIGTERM. It is useful because launchers kill a
    process half a minute after they pass on a SIGTERM. With several processes this call waits for the device.
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
    """Runs a recipe as a script, under a guard. An error that the user can fix exits with one line and a status.

    No error shows a secret from the command line.
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
        print(shown, file=sys.stderr)  # as Python would, without the secrets
        sys.exit(1)
