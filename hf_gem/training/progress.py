"""What a terminal shows of training."""

from __future__ import annotations

import shutil
import sys
from types import TracebackType
from typing import NoReturn

from accelerate import Accelerator
from tqdm.auto import tqdm


class Progress:
    """A bar on a terminal and lines elsewhere, on the main process alone.

    Args:
        accelerator: Of the run.
        start: Steps done so far.
        steps: Steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, start: int, steps: int) -> None:
        self.steps = steps
        self.has_bar = accelerator.is_main_process and sys.stderr.isatty()
        self.has_lines = accelerator.is_main_process and not self.has_bar
        width = min(shutil.get_terminal_size().columns, 120)
        self.bar: tqdm[NoReturn] = tqdm(
            total=steps, initial=start, desc="Training", unit="step", ncols=width, disable=not self.has_bar
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def show(self, step: int, figures: dict[str, str]) -> None:
        """Shows some figures of a step."""
        self.bar.set_postfix(figures, refresh=False)
        if self.has_lines:
            print(f"step {step} of {self.steps}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)

    def advance(self) -> None:
        """One step more is done."""
        self.bar.update()

    def go_back(self, step: int) -> None:
        """The run is at an earlier step again."""
        self.bar.n = step
