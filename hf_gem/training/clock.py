"""Measures the speed of training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """Measures tokens or images per second, and the share of time spent waiting for data.

    Time spent on evaluation and saving does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.units = 0
        self.waited = 0.0

    def add(self, units: int) -> None:
        self.units += units

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        elapsed = now - self.start
        found = self.units / elapsed, self.waited / elapsed
        self.start, self.units, self.waited = now, 0, 0.0
        return found

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that are still running belong to the time before
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before
