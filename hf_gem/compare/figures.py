"""The pictures of reports and summaries: PNG files, the same for the same numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..family.names import is_name, parse
from ..family.table import FAMILIES
from .estimates import over_seeds
from .looks import look
from .plan import Plan, Run
from .stats import Comparison
from .study import Study

_FEW = 12  # points of a curve that are marked


def of_study(study: Study, families: Mapping[str, tuple[str, Sequence[Comparison]]]) -> dict[str, bytes]:
    """All pictures of a report, by the names of their files.

    Args:
        study: With a finished tuning.
        families: Baseline -> file of its picture, and the comparisons with it.
    """
    acts = {arm: act for arm, (act, _) in study.choices().items()}
    pictures = {file: differences(study.plan, found, name, acts) for name, (file, found) in families.items()}
    pictures["curves.png"] = curves(study)
    made = {"n.png": ablation(study, "n"), "eps.png": ablation(study, "eps"), "dose.png": dose(study)}
    if study.plan.tunes:
        made["tuning.png"] = sensitivity(study)
    return pictures | {file: png for file, png in made.items() if png is not None}


@dataclass(frozen=True)
class Row:
    """One interval of a forest plot.

    Attributes:
        middle: Its middle.
        interval: The thick line.
        color: Of both.
        adjusted: The thin line; None where there is none.
        points: To draw beneath it.
    """

    middle: float
    interval: tuple[float, float]
    color: str
    adjusted: tuple[float, float] | None = None
    points: Sequence[float] = ()


def forest(rows: Mapping[str, Row], band: float, label: str, higher_is_better: bool) -> bytes:
    """A picture of intervals, one beneath the other.

    Args:
        rows: Name -> what is drawn.
        band: Half the width of what is of no interest, around 0.
        label: Of the axis.
        higher_is_better: Which side an arrow calls better.
    """
    figure, axes = _new_figure(7, 1.4 + 0.5 * len(rows))
    axes.axvspan(-band, band, color="0.9")
    axes.axvline(0, color="0.5", lw=0.8)
    for number, row in enumerate(rows.values()):
        axes.plot(row.points, np.full(len(row.points), number - 0.2), ".", color="0.6", ms=4)
        if row.adjusted:
            axes.plot(row.adjusted, (number, number), color=row.color, lw=1)
        axes.plot(row.interval, (number, number), color=row.color, lw=3)
        axes.plot(row.middle, number, "o", color=row.color)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    x, text = (1, "better \N{RIGHTWARDS ARROW}") if higher_is_better else (0, "\N{LEFTWARDS ARROW} better")
    side: Any = "right" if x else "left"
    axes.annotate(text, (x, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha=side, va="bottom")
    return _png_of(figure)


def differences(plan: Plan, comparisons: Sequence[Comparison], baseline: str, acts: Mapping[str, str]) -> bytes:
    """The difference of each arm from the baseline, with its intervals and its seeds.

    Args:
        plan: Of the study.
        comparisons: With the baseline.
        baseline: An arm.
        acts: Arm -> its activation.
    """
    rows = {
        f"{c.arm}: {c.verdict}": Row(
            c.difference,
            c.interval,
            look(acts[c.arm])["color"],
            c.adjusted_interval,
            np.subtract(c.values, c.baseline).tolist(),
        )
        for c in comparisons
    }
    return forest(rows, plan.smallest_effect, f"{plan.metric}, difference from {baseline}", plan.higher_is_better)


def curves(study: Study) -> bytes:
    """The metric of each arm over steps: the mean and the standard deviation of finished runs."""
    figure, axes = _new_figure(8, 4.2)
    key = study.plan.metric
    if not any(key in record["curves"] and len(record["curves"][key]) > 1 for record in _records(study)):
        key = study.plan.tuning_metric  # test samples are evaluated once
    for arm, runs in study.final_runs().items():
        finished = [r for run in runs if (r := study.record(run)) and math.isfinite(study.outcome(run))]
        if not finished:
            continue
        found = [dict(record["curves"][key]) for record in finished]
        steps = sorted(set.intersection(*map(set, found)))
        steps = steps[1:] if len(steps) > 2 else steps  # before any training all are alike, and far from what follows
        values = np.array([[curve[step] for step in steps] for curve in found], dtype=float)  # NaN for null
        middle, width = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
        style = look(runs[0].act)
        axes.plot(steps, middle, **style if len(steps) <= _FEW else {**style, "marker": ""}, ms=4, label=arm)
        axes.fill_between(steps, middle - width, middle + width, color=style["color"], alpha=0.12, lw=0)
    axes.set(xlabel="step", ylabel=key)
    return _png_with_legend(figure, axes)


def _records(study: Study) -> list[dict[str, Any]]:
    return [record for runs in study.final_runs().values() for run in runs if (record := study.record(run))]


def sensitivity(study: Study) -> bytes:
    """What tuning found, over learning rates: the mean of an activation within the best and the worst of its seeds.

    Large markers are the means of the final seeds, at the rates at which these have run.
    """
    plan = study.plan
    figure, axes = _new_figure(8, 4.4)
    shade = min(0.15, 0.8 / len(plan.acts))
    finalists = dict.fromkeys(trial for trials in study.finalists().values() for trial in trials)
    for number, act in enumerate(plan.acts):
        means, style = study.tuned(act), look(act)
        aside = plan.ratio ** (0.4 * ((number + 0.5) / len(plan.acts) - 0.5))  # or large markers would hide each other
        tuned = {rate: value for rate, value in means.items() if math.isfinite(value)}
        seeds = np.array([[study.outcome(Run(act, rate, seed)) for rate in tuned] for seed in plan.tuning_seeds])
        axes.plot(list(tuned), list(tuned.values()), **style, ms=4, label=act)
        axes.fill_between(list(tuned), seeds.min(0), seeds.max(0), color=style["color"], alpha=shade, lw=0)
        lost = [rate for rate in means if rate not in tuned]
        axes.plot(lost, np.full(len(lost), 0.98), "x", color=style["color"], transform=axes.get_xaxis_transform())
        for rate in (rate for name, rate in finalists if name == act):
            runs = [run for seed in plan.final_seeds if study.record(run := Run(act, rate, seed))]
            final = _finite(study.value(run, plan.tuning_metric) for run in runs)
            if final:
                axes.plot(rate * aside, np.mean(final), **{**style, "ls": ""}, ms=9, mfc="white", mew=2)
    axes.set(xscale="log", xlabel="learning rate", ylabel=plan.tuning_metric)
    _name_rates(axes, study.rates())
    return _png_with_legend(figure, axes)


def _name_rates(axes: Axes, rates: Sequence[float]) -> None:
    """Ticks at learning rates, on a logarithmic axis; slanted, since ten of them would overlap."""
    axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates], rotation=45, ha="right", rotation_mode="anchor")
    axes.xaxis.set_minor_locator(NullLocator())


def ablation(study: Study, key: str) -> bytes | None:
    """Outcomes by n or eps, of the arms and of tuning, where members of a family differ in it; None where none do."""
    plan = study.plan
    final = {study.choices()[arm][0]: _finite(found.values()) for arm, found in study.outcomes().items()}
    tuned = {act: _finite(study.tuned(act).values()) for act in plan.acts}
    best = {act: [plan.best(values)] for act, values in tuned.items() if values}
    sources: dict[str, tuple[Any, dict[str, Any]]] = {"final seeds": (_lines(final, key), {})}
    if plan.metric == plan.tuning_metric:  # what stands on one axis has to be of one kind
        sources["tuning"] = _lines(best, key), {"ls": ":", "mfc": "white"}
    if not any(lines for lines, _ in sources.values()):
        return None
    figure, axes = _new_figure(7, 4)
    for source, (lines, style) in sources.items():
        for label, points in lines.items():
            means, bars = _means(points.values())
            axes.errorbar(list(points), means, bars, **{**_look_of(label), **style}, label=f"{label}: {source}")
    axes.set(xlabel=key, ylabel=plan.metric, xscale="log" if key == "eps" else "linear")
    if key == "n":
        axes.set_xticks(sorted({n for lines, _ in sources.values() for points in lines.values() for n in points}))
    return _png_with_legend(figure, axes)


def dose(study: Study) -> bytes | None:
    """Outcomes by the half point of the gate over the rms of what activations are given at the start.

    One line for each n of GEM and E-GEM, and of SE-GEM, with 95 % t intervals over seeds; other activations are level
    lines. None where records do not have the rms, or members of no family differ in the half point.
    """
    lines: dict[str, dict[float, list[float]]] = {}
    others: dict[str, float] = {}
    for arm, found in study.outcomes().items():
        act, values, place = study.choices()[arm][0], _finite(found.values()), _dose_of(study, arm)
        if values and place:
            lines.setdefault(place[0], {})[place[1]] = values
        elif values and not is_name(act.split()[0]):
            others[act] = float(np.mean(values))
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, axes = _new_figure(8, 4.4)
    for label, points in sorted(lines.items()):
        family, n = label.split(", n = ")
        family, half = family.replace("-", "").lower(), 10 ** min(1.5 * int(n) - 4, 0.5)  # whose colours are far apart
        ratios, style = sorted(points), look(f"{family}_n{n}_eps{half ** (2 * int(n)):g}")
        means, bars = _means(points[ratio] for ratio in ratios)
        axes.errorbar(ratios, means, bars if len(points) == 1 else None, **style, label=label)
        axes.fill_between(ratios, np.subtract(means, bars), np.add(means, bars), color=style["color"], alpha=0.12, lw=0)
    for act, mean in others.items():
        axes.axhline(mean, color=look(act)["color"], ls="--", lw=1, label=act)
    axes.set(xscale="log", ylabel=study.plan.metric, xlabel="half point of the gate / rms of its inputs at the start")
    return _png_with_legend(figure, axes)


def _dose_of(study: Study, arm: str) -> tuple[str, float] | None:
    """The line that an arm is a point of, and where; None where its records do not say.

    Nor has an arm a place there whose flags change more than eps.
    """
    ratios, label = [], ""
    if not all(flag.startswith(("eps=", "match_c=")) for flag in study.choices()[arm][0].split()[1:]):
        return None
    for run in study.final_runs()[arm]:
        record = study.record(run) or {"config": {}}
        scales, act = record.get("activation_inputs"), str(record["config"].get("hidden_act"))
        if scales and is_name(act) and not (spec := parse(act)).learnable:  # the eps of eps=match is a number here
            label = f"{FAMILIES[spec.definition.kernels].title}, n = {spec.n}"
            ratios.append(spec.eps ** (1 / (2 * spec.n)) / scales["rms"])
    return (label, float(np.exp(np.mean(np.log(ratios))))) if ratios else None


def _means(groups: Iterable[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means, and half the widths of their 95 % t intervals; 0 for a single value."""
    estimates = [(np.array(values), len(values) > 1) for values in groups]
    means = [float(values.mean()) for values, _ in estimates]
    return means, [np.ptp(over_seeds(values).interval()) / 2 if some else 0.0 for values, some in estimates]


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


def _look_of(label: str) -> dict[str, Any]:
    """Of a line of `_lines`: that of the activation with what it has fixed."""
    family, *fixed = label.removesuffix(", learnable").split(", ")
    return look("_".join([family, *(text.replace(" = ", "") for text in fixed)]))


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure, in inches, and its axes. It is not one of pyplot's, which would have to choose a backend."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    return figure, figure.subplots()


def _png_with_legend(figure: Figure, axes: Axes) -> bytes:
    axes.grid(alpha=0.3)
    lines = len(axes.get_legend_handles_labels()[0])
    figure.set_figheight(max(figure.get_figheight(), 0.2 * (lines + 1)))
    figure.legend(loc="outside right upper", fontsize="small")
    return _png_of(figure)


def _png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})  # without the version of matplotlib
    return buffer.getvalue()
