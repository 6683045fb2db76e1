"""Draws functions, slopes and gates of activations, in the colours of the reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compare.looks import SAME, look
from ..family.names import is_claimed, parse
from ..modules import get_activation
from ..training.errors import ConfigError

STOCK: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "mish": F.mish}
_AXES = {"function": "f(x)", "slope": "f'(x)", "gate": "f(x) / x"}
_SAMPLES = 2400  # an even number, so that x = 0 is not among them, where the gate is 0/0


@dataclass(frozen=True)
class Panel:
    """A column of a figure.

    Attributes:
        title: Text above the column.
        names: Names of its activations.
    """

    title: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A figure of one column per panel.

    Attributes:
        panels: The columns, from left to right.
        rows: The rows, from top to bottom: `function`, `slope` or `gate`, which is f(x) / x.
    """

    panels: tuple[Panel, ...]
    rows: tuple[str, ...] = ("function", "slope")


_OTHERS = ("relu", "gelu", "silu")
FIGURES = {
    "family": Figure(
        (
            Panel("GEM", ("gem", "gem_n2", "gem_n3")),
            Panel("E-GEM, towards ReLU", ("egem_eps1", "egem_eps0.1", "egem_eps0.01", "egem")),
            Panel("SE-GEM", ("segem_eps1", "segem_eps0.1", "segem_n2_eps0.1", "segem")),
        )
    ),
    "n": Figure((Panel("GEM", ("gem", "gem_n2", "gem_n3", *_OTHERS)),), ("function", "slope", "gate")),
    "eps": Figure(
        (
            Panel("E-GEM, n = 1", ("egem_eps1", "egem_eps0.1", "egem_eps0.01", "egem", "relu")),
            Panel("E-GEM, n = 2", ("egem_n2_eps1", "egem_n2_eps0.1", "egem_n2_eps0.01", "egem_n2", "relu")),
        )
    ),
    "gates": Figure(
        (
            Panel("GEM", ("gem", "gem_n2", "gem_n3", *_OTHERS)),
            Panel("SE-GEM", ("segem_eps1", "segem_eps0.1", "segem_eps0.01", *_OTHERS)),
        ),
        ("gate",),
    ),
}


def draw(figure: Figure, reach: float = 3.0) -> Any:
    """Returns a matplotlib figure.

    Args:
        figure: The figure to draw.
        reach: Largest x. The smallest one is its negative.

    Raises:
        ConfigError: An activation or a row is unknown.
        ValueError: A name of the family is malformed.
    """
    if unknown := [row for row in figure.rows if row not in _AXES]:
        raise ConfigError(f"the row {unknown[0]!r} is not known. The rows are {', '.join(_AXES)}.")
    if not 0 < reach < float("inf"):
        raise ConfigError(f"reach must be above 0 and finite, got {reach}.")
    from ..compare.drawing import new_figure

    columns = len(figure.panels)
    shown = new_figure(1.6 + 3.2 * columns, 2.8 * len(figure.rows), h_pad=None)
    axes = shown.subplots(len(figure.rows), columns, sharex=True, sharey="row", squeeze=False)
    for column, panel in enumerate(figure.panels):
        axes[0, column].set_title(panel.title)
        for name in panel.names:
            curves = _curves(name, reach)
            for row, what in enumerate(figure.rows):
                axes[row, column].plot(*curves[what], lw=1.4, label=name, **_style(name))
        for row, what in enumerate(figure.rows):
            axes[row, column].grid(alpha=0.3)
            axes[row, 0].set_ylabel(_AXES[what])
        axes[0, column].legend(loc="upper left", fontsize=8)
        axes[-1, column].set_xlabel("x")
    return shown


def save(figure: Figure, path: Path, reach: float = 3.0) -> Path:
    """Draws a figure into a file and returns its path. The suffix sets the format; without one, it is .png."""
    shown = draw(figure, reach)
    path = path if path.suffix else path.with_suffix(".png")
    if path.suffix == ".svg":
        from ..compare.drawing import svg_of

        path.write_bytes(svg_of(shown))
    else:
        shown.savefig(path)
    return path


def _style(name: str) -> dict[str, Any]:
    """Returns the colour and line of the reports. The family is drawn on top of the others."""
    style = {key: value for key, value in look(_stock_name(name)).items() if key != "marker"}
    return {**style, "zorder": 3 if is_claimed(name) else 2}


def _stock_name(name: str) -> str:
    return SAME.get(name.lower(), name.lower())


def _curves(name: str, reach: float) -> dict[str, tuple[Any, Any]]:
    """Returns row -> x and y."""
    function = get_activation(parse(name).name) if is_claimed(name) else STOCK.get(_stock_name(name))
    if function is None:
        raise ConfigError(f"the activation {name!r:.80} is not known. Give names of the family, {', '.join(STOCK)}.")
    x = torch.linspace(-reach, reach, _SAMPLES, dtype=torch.float64, device="cpu", requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    x, y = x.detach(), y.detach()
    return {"function": (x, y), "slope": (x, slope), "gate": (x, y / x)}
