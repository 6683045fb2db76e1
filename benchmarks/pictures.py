"""Draws pictures from the records of the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_gem.compare.drawing import End, label_ends, mark_better, new_figure, picture_of, tidy
from hf_gem.compare.looks import look
from hf_gem.family.table import FAMILIES

_COMPILED = "torch.compile("
_MADE_FROM = {"Liger SwiGLU": "silu", "Liger GEGLU": "gelu"}


def draw_sweep(record: dict[str, Any], path: Path) -> None:
    """Draws the time per element, and the share of a copy's bandwidth, by size.

    Each column has the activations in eager mode, compiled, or gated.
    """
    points = record["results"]["points"]
    names = [name for name in points[0]["plain"]["median_seconds"] if name != "copy"]
    columns = {
        "eager": ("plain", [name for name in names if not name.startswith(_COMPILED)]),
        "torch.compile": ("plain", [name for name in names if name.startswith(_COMPILED)]),
        "gated, eager": ("gated", [name for name in points[0]["gated"]["median_seconds"] if name != "copy"]),
    }
    columns = {title: (kind, found) for title, (kind, found) in columns.items() if found}
    figure = new_figure(4.7 * len(columns), 7.4)
    grid = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for (above, below), (title, (kind, found)) in zip(grid.T, columns.items(), strict=True):
        above.set(title=title, yscale="log")
        below.set_xscale("log", base=2)
        below.set_xlabel(f"elements, {record['results']['dtype']}")
        for axes, measure, better in ((above, _nanoseconds, False), (below, _share, True)):
            tidy(axes)
            mark_better(axes, better)
            ends = [_draw_line(axes, name, [(p["elements"], measure(p, kind, name)) for p in points]) for name in found]
            label_ends(axes, ends)
    grid[0, 0].set_ylabel("ns an element, forward and backward")
    grid[1, 0].set_ylabel("share of a copy's bandwidth")
    path.write_bytes(picture_of(figure).png)


def _nanoseconds(point: dict[str, Any], kind: str, name: str) -> float:
    return 1e9 * float(point[kind]["median_seconds"][name]) / int(point["elements"])


def _share(point: dict[str, Any], kind: str, name: str) -> float:
    return float(point[kind]["share_of_copy_bandwidth"][name])


def _draw_line(axes: Any, name: str, points: Sequence[tuple[int, float]]) -> End:
    shown = name.removeprefix(_COMPILED).removesuffix(")") if name.startswith(_COMPILED) else name
    act = _MADE_FROM.get(shown) or shown.partition("(")[0].removesuffix("_glu")
    style = {**look(act), "marker": "", "lw": 2.2 if act.startswith(tuple(FAMILIES)) else 1.2}
    if "(" in shown:  # several operations, next to a fused one of the same activation
        style["ls"] = "--"
    axes.plot(*zip(*points, strict=True), **style)
    return End(shown, *points[-1], style["color"])
