"""What all pictures of reports have in common: files, labels beside lines, and which way is better."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from .looks import ink

BAND = "0.92"  # the grey of differences that are of no interest
SMALL = 9  # points
_BETTER = {  # (across, higher) -> the words
    (True, True): "better \N{RIGHTWARDS ARROW}",
    (True, False): "\N{LEFTWARDS ARROW} better",
    (False, True): "\N{UPWARDS ARROW} better",
    (False, False): "\N{DOWNWARDS ARROW} better",
}
# The factor that an axis spans at most -> its ticks in each factor of ten.
_TICKS = {8: (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), 200: (1.0, 2.0, 5.0)}


@dataclass(frozen=True)
class Picture:
    """A picture in two formats: the same bytes for the same numbers.

    Attributes:
        png: The format for Markdown.
        svg: The format for pages in HTML. It is sharp at every size.
    """

    png: bytes
    svg: bytes


def new_figure(width: float, height: float, h_pad: float | None = 0.08) -> Figure:
    """Returns a figure. It does not belong to pyplot, which would have to choose a backend.

    Args:
        width: Width in inches.
        height: Height in inches.
        h_pad: Space above and below each panel in inches. None means matplotlib's default.
    """
    return Figure(figsize=(width, height), dpi=110, layout=ConstrainedLayoutEngine(h_pad=h_pad))


def picture_of(figure: Figure) -> Picture:
    """Returns the files of a finished figure."""
    png = io.BytesIO()
    figure.savefig(png, metadata={"Software": None})  # without the version of matplotlib
    return Picture(png.getvalue(), svg_of(figure))


def svg_of(figure: Figure) -> bytes:
    """Returns a finished figure as SVG: the same bytes for the same numbers."""
    svg = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "hf_gem"}):  # or the names inside would be new each time
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return svg.getvalue()


def tidy(axes: Axes) -> None:
    """Takes away what carries no information."""
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def readable(metric: str) -> str:
    """Returns a metric in words: `validation_loss` is "validation loss"."""
    return metric.replace("log10_relative_l2", "log10 of relative L2 error").replace("_", " ")


def metric_label(metric: str, unit: str, of: str = "") -> str:
    """Returns the label of an axis.

    Args:
        metric: A metric, such as `validation_loss`.
        unit: A unit, such as nats; empty if there is none.
        of: Words between the two, such as "minus that of relu".
    """
    return readable(metric) + (f" {of}" if of else "") + (f" ({unit})" if unit else "")


def show_metric(axis: Axis, metric: str) -> None:
    """Writes accuracies in per cent."""
    if metric.endswith("accuracy"):
        axis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def show_scale(axis: Axis) -> None:
    """Ticks of a logarithmic axis: plain numbers, more in each factor of ten the shorter the axis is."""
    low, high = axis.get_view_interval()
    subs = next((subs for factor, subs in _TICKS.items() if high / low < factor), (1.0,))
    axis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def mark_better(axes: Axes, higher: bool, across: bool = False) -> None:
    """Says above a panel which way is better.

    Args:
        axes: The panel.
        higher: Whether higher values are better.
        across: Whether values run from left to right.
    """
    right = across and higher
    axes.annotate(
        _BETTER[across, higher],
        (1.0 if right else 0.0, 1.0),
        (0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom",
        fontsize=SMALL,
        color="0.3",
    )


@dataclass(frozen=True)
class End:
    """The right end of a line.

    Attributes:
        name: The name of the line.
        x: The horizontal position of the end, in data coordinates.
        y: The vertical position of the end, in data coordinates.
        color: The color of the line.
    """

    name: str
    x: float
    y: float
    color: str


def label_ends(axes: Axes, ends: Sequence[End]) -> None:
    """Writes names to the right of a panel, beside the ends of their lines, and moves them apart where they overlap.

    Call it last: it needs the final limits of the axes.
    """
    ends = sorted((end for end in ends if math.isfinite(end.y)), key=lambda end: end.y)
    if not ends:
        return
    from scipy.optimize import isotonic_regression  # other pictures do without scipy

    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # lays the figure out
    bottom, height = axes.bbox.y0, axes.bbox.height
    wanted = np.array([axes.transData.transform((end.x, end.y))[1] for end in ends]) - bottom
    gaps = 1.3 * SMALL * figure.dpi / 72 * np.arange(len(ends))
    places = isotonic_regression(wanted - gaps).x  # as near to what is wanted as the gaps allow
    places = np.clip(places, 0, max(0.0, height - gaps[-1])) + gaps
    for end, place in zip(ends, places, strict=True):
        axes.annotate(
            end.name,
            (end.x, end.y),
            (1.03, place / height),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=ink(end.color),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.7,
                "color": end.color,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )
