"""Runs commands for a limited time, and shows their output as it comes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LAST = 25  # lines to keep
_GRACE = 20.0  # seconds between asking a command to stop and killing it


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: Exit status, negative for a signal.
        seconds: Time that it ran.
        last_lines: Last lines of its output.
        stopped: Whether its time was up.
    """

    status: int
    seconds: float
    last_lines: list[str]
    stopped: bool


def run_for(seconds: float, command: Sequence[str], env: Mapping[str, str] | None = None, group: bool = False) -> Ended:
    """Runs a command in the root of the repository, and stops it when its time is up.

    Args:
        seconds: Time limit.
        command: The command with its arguments.
        env: Further environment variables.
        group: Whether to also stop all processes that it starts. Otherwise it has to stop them itself.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=group,
    )  # fmt: skip

    def send(number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number) if group else process.send_signal(number)

    timers = [
        threading.Timer(seconds, send, [signal.SIGTERM]),
        threading.Timer(seconds + _GRACE, send, [signal.SIGKILL]),
    ]
    last: deque[str] = deque(maxlen=_LAST)
    try:
        for timer in timers:
            timer.daemon = True
            timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last.append(line.rstrip())
        status = process.wait()
    finally:
        for timer in timers:
            timer.cancel()
        if process.poll() is None:  # after an exception here, such as Ctrl-C
            send(signal.SIGTERM)
    taken = time.monotonic() - began
    return Ended(status, taken, list(last), stopped=taken >= seconds)
