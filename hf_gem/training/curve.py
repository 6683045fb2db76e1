"""Draws the loss of a run, while it trains and at its end."""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import write_atomically

_EVERY = 30.0  # seconds between two pictures of a run under way, each of which takes a few tenths of one
_GREY, _BLACK = "#999999", "#222222"  # colours that stand for no activation


class LiveCurve:
    """Redraws the picture of a run, at most twice a minute and never in its first half.

    Args:
        path: The file of the picture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.due = time.monotonic() + _EVERY

    def draw(self, record: Mapping[str, Any]) -> None:
        """Draws the values that a record has so far."""
        if time.monotonic() >= self.due and can_draw():
            draw_loss(record, self.path)
            self.due = time.monotonic() + _EVERY


def can_draw() -> bool:
    """Returns whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_loss(record: Mapping[str, Any], path: Path, unit: str = "") -> None:
    """Draws training and validation loss over steps as a PNG, and validation accuracy beside them if there is one.

    Args:
        record: The record of a run, which may be under way.
        path: The picture. It is replaced in one step, so that a viewer never sees half of it.
        unit: The unit of the loss.
    """
    from matplotlib.figure import Figure  # not pyplot, which would choose a backend for the whole process

    curves, config = record["curves"], record["config"]
    accuracy = curves.get("validation_accuracy")
    panels = 2 if accuracy else 1
    figure = Figure(figsize=(7 if panels == 1 else 10, 4), dpi=150, layout="constrained")
    loss, *right = figure.subplots(1, panels, squeeze=False)[0]
    _plot(loss, curves["loss"], "training", color=_GREY, lw=1)
    _plot(loss, curves.get("validation_loss"), "validation", color=_BLACK, lw=1.6, marker="o", ms=3.5)
    scale = "log" if "validation_relative_l2" in curves else "linear"  # it falls over orders of magnitude
    loss.set(ylabel=f"loss ({unit})" if unit else "loss", yscale=scale)
    loss.legend(frameon=False)
    for axes in right:
        _plot(axes, [(step, 100 * share) for step, share in accuracy], color=_BLACK, lw=1.6, marker="o", ms=3.5)
        axes.set_ylabel("validation accuracy (%)")
    for axes in (loss, *right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    step = max(curve[-1][0] for curve in curves.values() if curve)
    progress = "" if record["status"] == "finished" else f", step {step} of {config['steps']}"
    title = f"{record['recipe']} {record['preset']}, {config['hidden_act']}, seed {config['seed']}{progress}"
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    write_atomically(path, buffer.getvalue())


def _plot(axes: Any, curve: Any, label: str | None = None, **style: Any) -> None:
    steps, values = zip(*curve, strict=True) if curve else ((), ())
    axes.plot(steps, [float("nan") if value is None else value for value in values], label=label, **style)
