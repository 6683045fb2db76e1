"""What a terminal or a log shows of training."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

_WIDEST = 120
_PRECISIONS = {"no": "float32"}  # others have their own names
_SHOWN_VERSIONS = ("torch", "transformers", "timm", "hf-gem")


def bar_width() -> int:
    """Returns the width of a progress bar in columns; 0 if standard error cannot show one.

    A log file cannot, and neither can a terminal that reports a width of 0, as inside `script`. Lines suit both.
    """
    try:
        return min(os.get_terminal_size(sys.stderr.fileno()).columns, _WIDEST)
    except (AttributeError, OSError, ValueError):  # standard error may be any object
        return 0


def clock_time() -> str:
    """Returns the time of day, for the beginning of a line."""
    return f"{datetime.now():%H:%M:%S}"


def time_left(seconds: float, done: float, left: float) -> str:
    """Returns the remaining time, as text.

    Args:
        seconds: The time spent so far.
        done: The amount of work done in this time.
        left: The amount of work left, in the same unit.
    """
    return f"{tqdm.format_interval(seconds / done * left)} left" if done > 0 else "unknown time left"


class Progress:
    """A bar on a terminal and lines in a log, from the main process only.

    Args:
        accelerator: The accelerator of the run.
        start: Number of steps done so far.
        steps: Number of steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, start: int, steps: int) -> None:
        self.steps = steps
        width = bar_width() if accelerator.is_main_process else 0
        self.has_lines = accelerator.is_main_process and not width
        self.bar: tqdm[NoReturn] = tqdm(
            total=steps, initial=start, desc="Training", unit="step", ncols=width, disable=not width
        )
        self.since: tuple[int, float] | None = None  # the first step shown, which may have compiled, and its time

    def show(self, step: int, figures: Mapping[str, str]) -> None:
        """Shows some figures of a step."""
        self.bar.set_postfix(figures, refresh=False)
        if self.has_lines:
            now = time.monotonic()
            first, then = self.since = self.since or (step, now)
            shown = [f"{name} {value}" for name, value in figures.items()]
            if step > first:
                shown.append(time_left(now - then, step - first, self.steps - step))
            print(f"{clock_time()} step {step} of {self.steps}: {', '.join(shown)}", flush=True)

    def advance(self) -> None:
        """Counts one more step."""
        self.bar.update()

    def go_back(self, step: int) -> None:
        """Continues from an earlier step."""
        self.bar.n = step
        self.since = None


def headline(record: Mapping[str, Any], session: Mapping[str, Any], device: torch.device, start: int) -> str:
    """Returns the first line of a log: time, run, size, precision, device and versions.

    Args:
        record: The record of the run.
        session: The current session of the run.
        device: The device of the main process.
        start: Number of steps done so far.
    """
    config, versions = record["config"], session["versions"]
    precision = _PRECISIONS.get(record["mixed_precision"], record["mixed_precision"])
    named = ", ".join(f"{name} {versions[name]}" for name in _SHOWN_VERSIONS if name in versions)
    return (
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z} {record['recipe']} {record['preset']}: "
        f"{config['hidden_act']}, {record['num_parameters']:,} parameters, {precision}, "
        f"steps {start + 1} to {config['steps']}; {_device_name(session, device)}; {named}"
    )


def _device_name(session: Mapping[str, Any], device: torch.device) -> str:
    hardware, processes = session["hardware"], session["num_processes"]
    each = f"{processes} processes, each on " if processes > 1 else ""
    if device.type == "cuda":
        return f"{each}{torch.cuda.get_device_name(device)} with CUDA {hardware['cuda']}"
    if device.type != "cpu":
        return f"{each}{device.type}"
    # A driver that is too old leaves a run on the CPU, which otherwise looks like a slow run.
    unused = ", no GPU found by a torch that is built for CUDA" if torch.version.cuda else ""
    threads = hardware["torch_threads"]
    return f"{each}{threads} CPU thread{'s' * (threads > 1)} of {hardware['cpu']}{unused}"
