"""The pictures of reports and summaries: PNG files, the same for the same numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..family.names import is_name, parse
from .estimates import over_seeds
from .plan import Plan, Run
from .stats import Comparison
from .study import Study


def of_study(study: Study, comparisons: Sequence[Comparison], baseline: str) -> dict[str, bytes]:
    """All pictures of a report, by the names of their files."""
    pictures = {"forest.png": differences(study.plan, comparisons, baseline), "curves.png": curves(study)}
    pictures |= {f"{key}.png": png for key in ("n", "eps") if (png := ablation(study, key)) is not None}
    if study.plan.tunes:
        pictures["tuning.png"] = sensitivity(study)
    return pictures


def forest(rows: Mapping[str, tuple[float, tuple[float, float], Sequence[float]]], band: float, label: str) -> bytes:
    """A picture of intervals, one beneath the other.

    Args:
        rows: Name -> the middle, the interval, and points to draw beneath it.
        band: Half the width of what is of no interest, around 0.
        label: Of the axis.
    """
    figure, axes = _new_figure(7, 1.2 + 0.5 * len(rows))
    axes.axvspan(-band, band, color="0.9")
    axes.axvline(0, color="0.5", lw=0.8)
    for row, (middle, interval, points) in enumerate(rows.values()):
        axes.plot(interval, (row, row), color="C0", lw=2)
        axes.plot(points, np.full(len(points), row - 0.2), ".", color="0.6", ms=4)
        axes.plot(middle, row, "o", color="C0")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return _png_of(figure)


def differences(plan: Plan, comparisons: Sequence[Comparison], baseline: str) -> bytes:
    """The difference of each arm from the baseline, with its interval and its seeds."""
    rows = {
        f"{c.arm}: {c.verdict}": (c.difference, c.interval, np.subtract(c.values, c.baseline).tolist())
        for c in comparisons
    }
    return forest(rows, plan.smallest_effect, f"{plan.metric}, difference from {baseline}")


def curves(study: Study) -> bytes:
    """The metric of each arm over steps: the mean and the standard deviation of finished runs."""
    figure, axes = _new_figure(7, 4.2)
    key = study.plan.metric
    for row, (arm, runs) in enumerate(study.final_runs().items()):
        finished = [r for run in runs if (r := study.record(run)) and math.isfinite(study.outcome(run))]
        if not finished:
            continue
        found = [dict(record["curves"][key]) for record in finished]
        steps = sorted(set.intersection(*map(set, found)))
        steps = steps[1:] if len(steps) > 2 else steps  # before any training all are alike, and far from what follows
        values = np.array([[curve[step] for step in steps] for curve in found], dtype=float)  # NaN for null
        middle, width = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
        axes.plot(steps, middle, color=f"C{row}", label=arm)
        axes.fill_between(steps, middle - width, middle + width, color=f"C{row}", alpha=0.2, lw=0)
    axes.set(xlabel="step", ylabel=key)
    return _png_with_legend(figure, axes)


def sensitivity(study: Study) -> bytes:
    """What tuning found, over learning rates."""
    figure, axes = _new_figure(7, 4.2)
    for act in study.plan.acts:
        means = study.tuned(act)
        tuned = {rate: value for rate, value in means.items() if math.isfinite(value)}
        (line,) = axes.plot(list(tuned), list(tuned.values()), "o-", label=act)
        for seed in study.plan.tuning_seeds:
            axes.plot(list(tuned), [study.outcome(Run(act, rate, seed)) for rate in tuned], ".", color="0.7", ms=3)
        lost = [rate for rate in means if rate not in tuned]
        axes.plot(lost, np.full(len(lost), 0.98), "x", color=line.get_color(), transform=axes.get_xaxis_transform())
    axes.set(xscale="log", xlabel="learning rate", ylabel=study.plan.metric)
    return _png_with_legend(figure, axes)


def ablation(study: Study, key: str) -> bytes | None:
    """Outcomes by n or eps, of the arms and of tuning, where members of a family differ in it; None where none do."""
    plan = study.plan
    final = {study.choices()[arm][0]: _finite(found.values()) for arm, found in study.outcomes().items()}
    tuned = {act: _finite(study.tuned(act).values()) for act in plan.acts}
    best = {act: [plan.best(values)] for act, values in tuned.items() if values}
    sources = {"final seeds": (_lines(final, key), "o-"), "tuning": (_lines(best, key), ".:")}
    if not any(lines for lines, _ in sources.values()):
        return None
    figure, axes = _new_figure(6, 4)
    colors: dict[str, str] = {}
    for source, (lines, style) in sources.items():
        for label, points in lines.items():
            color = colors.setdefault(label, f"C{len(colors)}")
            means = [float(np.mean(values)) for values in points.values()]
            bars = [
                np.ptp(over_seeds(np.array(values)).interval()) / 2 if len(values) > 1 else 0
                for values in points.values()
            ]
            axes.errorbar(list(points), means, bars, fmt=style, color=color, label=f"{label}: {source}")
    axes.set(xlabel=key, ylabel=plan.metric, xscale="log" if key == "eps" else "linear")
    if key == "n":
        axes.set_xticks(sorted({n for lines, _ in sources.values() for points in lines.values() for n in points}))
    return _png_with_legend(figure, axes)


def _lines(outcomes: Mapping[str, list[float]], key: str) -> dict[str, dict[float, list[float]]]:
    """Outcomes of the activations that differ in n or eps alone, by its value; only where there are two or more."""
    lines: dict[str, dict[float, list[float]]] = {}
    for act, values in outcomes.items():
        if is_name(act) and values:
            spec = parse(act)
            if spec.family != "gem" or key == "n":
                fixed = f"eps = {spec.eps:g}" if key == "n" else f"n = {spec.n}"
                label = spec.family if spec.family == "gem" else f"{spec.family}, {fixed}"
                label += ", learnable" if spec.learnable else ""
                lines.setdefault(label, {})[float(getattr(spec, key))] = values
    return {label: dict(sorted(points.items())) for label, points in lines.items() if len(points) > 1}


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure, in inches, and its axes. It is not one of pyplot's, which would have to choose a backend."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots()


def _png_with_legend(figure: Figure, axes: Axes) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend()
    return _png_of(figure)


def _png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})  # without the version of matplotlib
    return buffer.getvalue()
