"""Shows the progress of a study on a terminal or in a log."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from tqdm.auto import tqdm

from ..training.progress import bar_width, clock_time, time_left
from ..training.record import read_record
from .plan import Run
from .study import Study

_BAR = "{desc} {percentage:.0f}%|{bar}| {n:.1f} of {total} runs, {remaining} left{postfix}"
_EVERY = 1.0  # seconds between reads of the logs of runs
_TAIL = 4096  # bytes at the end of a log that contain its last line


class StudyProgress:
    """A bar on a terminal, or lines in a log. Both name the current runs, and the bar counts their steps.

    Args:
        study: The study that runs.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.done = self.first = study.num_records()
        self.left = study.left()
        self.began, self.looked = time.monotonic(), 0.0
        self.under_way: dict[Run, int | None] = {}  # their numbers of steps, once known
        width = bar_width()
        self.has_lines = not width
        self.bar: tqdm[NoReturn] = tqdm(
            total=self.done + self.left,
            initial=self.done,
            desc=study.plan.name,
            ncols=width,
            disable=not width,
            bar_format=_BAR,
            smoothing=0,
        )

    def start(self, run: Run) -> None:
        """Shows that a run has started."""
        self.under_way[run] = None
        if self.has_lines:
            self._print(f"{run.name} begins")
        self._draw()

    def leave(self, run: Run) -> None:
        """Shows that a run has stopped. `count` counts it."""
        self.under_way.pop(run, None)

    def count(self, runs: int = 1) -> None:
        """Counts runs that have a record now, from this driver or another one."""
        self.done += runs
        self.left = self.study.left()
        if self.has_lines:
            remaining = time_left(time.monotonic() - self.began, self.done - self.first, self.left)
            self._print(f"{self.done} of {self.done + self.left} runs done, {remaining}")
        self._draw()

    def look(self) -> None:
        """Draws the bar with the steps of the current runs, at most once a second."""
        if not self.has_lines and time.monotonic() > self.looked + _EVERY:
            self.looked = time.monotonic()
            self._draw()

    def write(self, text: str) -> None:
        """Shows a message above the bar."""
        self.bar.write(text, file=sys.stderr)

    def _draw(self) -> None:
        if self.has_lines:
            return
        self.bar.total = self.done + self.left
        self.bar.n = min(self.bar.total, self.done + sum(self._share(run) for run in self.under_way))
        names = [run.name for run in self.under_way]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        self.bar.set_postfix_str("".join(names[:1]) + more, refresh=True)

    def _share(self, run: Run) -> float:
        """Returns the share of a run that is done, from the last line of its log."""
        folder = self.study.folder / "runs" / run.name
        if self.under_way[run] is None:
            with contextlib.suppress(OSError, ValueError):  # it does not exist yet, or is incomplete
                self.under_way[run] = read_record(folder / "record.json")["config"].get("steps")
        steps = self.under_way[run]
        return min(1.0, _last_step(folder / "log.jsonl") / steps) if steps else 0.0

    def _print(self, text: str) -> None:
        with tqdm.get_lock():  # Python 3.11 can crash if two threads print at once
            print(f"{clock_time()} {self.study.plan.name}: {text}", flush=True)


def _last_step(log: Path) -> int:
    """Returns the last step in the log of a run, or 0 if it has none yet."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            steps = re.findall(rb'"step": ?(\d+)[,}]', file.read())
    except OSError:
        return 0
    return int(steps[-1]) if steps else 0
