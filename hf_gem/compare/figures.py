"""Draws the pictures of reports and summaries."""

from __future__ import annotations

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
from .drawing import (
    BAND,
    SMALL,
    End,
    Picture,
    label_ends,
    mark_better,
    metric_label,
    new_figure,
    picture_of,
    show_metric,
    show_scale,
    tidy,
)
from .estimates import over_seeds
from .looks import ink, look
from .plan import Run
from .stats import Comparison
from .study import Study

_FEW = 12  # points of a curve that are marked
SETTLED = ("better", "worse", "equivalent")


def of_study(study: Study, families: Mapping[str, tuple[str, Sequence[Comparison]]]) -> dict[str, Picture]:
    """Draws all pictures of a report, and returns them by file name.

    Args:
        study: A study whose tuning is finished.
        families: Baseline -> file of its picture, and the comparisons with it.
    """
    acts = {arm: act for arm, (act, _) in study.choices().items()}
    pictures = {file: forests([differences(study, found, name, acts)]) for name, (file, found) in families.items()}
    pictures["curves.png"] = curves(study, next(iter(families)))
    made = {"n.png": ablation(study, "n"), "eps.png": ablation(study, "eps"), "dose.png": dose(study)}
    if study.plan.tunes:
        made["tuning.png"] = sensitivity(study)
    return pictures | {file: picture for file, picture in made.items() if picture is not None}


@dataclass(frozen=True)
class Row:
    """One interval of a forest plot.

    Attributes:
        middle: The point in the interval.
        interval: The ends of the thick line.
        color: The color of point and lines.
        adjusted: The ends of the thin line; None if there is none.
        points: Further points, drawn above the line.
        settled: Whether there is a verdict. Otherwise the point is hollow.
    """

    middle: float
    interval: tuple[float, float]
    color: str
    adjusted: tuple[float, float] | None = None
    points: Sequence[float] = ()
    settled: bool = True


@dataclass(frozen=True)
class Panel:
    """A forest plot: intervals, one below the other.

    Attributes:
        rows: Name -> interval.
        band: Differences smaller than this are of no interest.
        label: The label of the horizontal axis.
        metric: The metric whose differences are shown.
        higher_is_better: Whether the right side is better.
        title: The text above the panel.
    """

    rows: Mapping[str, Row]
    band: float
    label: str
    metric: str
    higher_is_better: bool
    title: str = ""


def forests(panels: Sequence[Panel]) -> Picture:
    """Draws forest plots, in two columns if there are several."""
    columns = min(2, len(panels))
    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [1.1 + 0.42 * max(len(panel.rows) for panel in line) for line in lines]
    figure = new_figure(7 if columns == 1 else 12, sum(heights) + 0.2)
    grid = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, panel in zip(grid.flat, panels, strict=False):
        _forest(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    return picture_of(figure)


def _forest(axes: Axes, panel: Panel) -> None:
    tidy(axes)
    axes.grid(visible=False, axis="y")
    axes.axvspan(-panel.band, panel.band, color=BAND, zorder=0)
    axes.axvline(0, color="0.5", lw=0.8)
    for number, row in enumerate(panel.rows.values()):
        axes.plot(row.points, np.full(len(row.points), number - 0.25), ".", color="0.65", ms=4)
        if row.adjusted:
            axes.plot(row.adjusted, (number, number), color=row.color, lw=1)
        axes.plot(row.interval, (number, number), color=row.color, lw=3)
        axes.plot(row.middle, number, "o", color=row.color, mfc=row.color if row.settled else "white", mew=1.5)
    axes.set_yticks(range(len(panel.rows)), list(panel.rows))
    for label, row in zip(axes.get_yticklabels(), panel.rows.values(), strict=True):
        label.set_color(ink(row.color))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(panel.rows) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=6)  # more would overlap
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.label)
    show_metric(axes.xaxis, panel.metric)
    mark_better(axes, panel.higher_is_better, across=True)


def differences(study: Study, comparisons: Sequence[Comparison], baseline: str, acts: Mapping[str, str]) -> Panel:
    """Returns a panel with the difference of each arm from the baseline, its intervals and its seeds.

    Args:
        study: The study of the comparisons.
        comparisons: The comparisons with the baseline.
        baseline: Name of the baseline arm.
        acts: Arm -> its activation.
    """
    plan = study.plan
    rows = {
        f"{c.arm}: {c.verdict}": Row(
            c.difference,
            c.interval,
            look(acts[c.arm])["color"],
            c.adjusted_interval,
            np.subtract(c.values, c.baseline).tolist(),
            c.verdict in SETTLED,
        )
        for c in comparisons
    }
    unit = unit_of(study, plan.metric, difference=True)
    label = metric_label(plan.metric, unit, f"minus that of {baseline}")
    return Panel(rows, plan.smallest_effect, label, plan.metric, plan.higher_is_better)


def unit_of(study: Study, metric: str, difference: bool = False) -> str:
    """Returns the unit of a metric: nats, per cent or points. Empty if it has none.

    Args:
        study: A study with this metric.
        metric: A metric, such as `validation_loss`.
        difference: Whether the unit is for differences.
    """
    if metric.endswith("accuracy"):
        return "points" if difference else "%"
    counted = {record["result"].get("unit") for record in _records(study)}
    return "nats" if metric.endswith("_loss") and counted <= {"tokens", "images"} else ""


@dataclass(frozen=True)
class Course:
    """The values of a metric over steps, for one arm.

    Attributes:
        steps: The steps of the measurements.
        values: Seed -> the values at these steps.
    """

    steps: list[int]
    values: dict[int, np.ndarray]

    def minus(self, other: Course) -> Course:
        """Returns the differences at the seeds and steps that both have."""
        steps = sorted({*self.steps} & {*other.steps})
        seeds = self.values.keys() & other.values.keys()
        mine, theirs = ([course.steps.index(step) for step in steps] for course in (self, other))
        return Course(steps, {seed: self.values[seed][mine] - other.values[seed][theirs] for seed in sorted(seeds)})


def curves(study: Study, baseline: str) -> Picture:
    """Draws the metric of each arm over steps, and the difference of its training loss from the baseline's.

    Lines are means of finished runs, and bands are standard deviations. The first tenth of the steps is left out if two
    points remain, because all arms are alike there and far from their later values.

    Args:
        study: A study whose tuning is finished.
        baseline: Name of the baseline arm.
    """
    plan = study.plan
    known = {key for record in _records(study) for key, curve in record["curves"].items() if len(curve) > 1}
    key = plan.metric if plan.metric in known else plan.tuning_metric  # test samples are evaluated once
    panels = [(key, "", _courses(study, key))]
    losses = _courses(study, "loss")
    if baseline in losses:
        paired = {arm: course.minus(losses[baseline]) for arm, course in losses.items()}
        panels.append(("training_loss", f"minus that of {baseline}", paired))
    figure = new_figure(2.2 + 4.4 * len(panels), 4.4)
    for axes, (metric, of, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.set_xlabel("step")
        axes.set_ylabel(metric_label(metric, unit_of(study, metric), of), fontsize=SMALL)
        show_metric(axes.yaxis, metric)
        mark_better(axes, metric.endswith("accuracy"))
        _draw_courses(axes, {arm: (study.choices()[arm][0], course) for arm, course in found.items()})
    return picture_of(figure)


def _courses(study: Study, metric: str) -> dict[str, Course]:
    """Returns arm -> the values of its finished runs, at the steps that all of these runs have."""
    found = {}
    for arm, runs in study.final_runs().items():
        records = {
            run.seed: record for run in runs if (record := study.record(run)) and math.isfinite(study.outcome(run))
        }
        measured = {seed: dict(record["curves"].get(metric, ())) for seed, record in records.items()}
        steps = sorted(set.intersection(*(set(curve) for curve in measured.values()))) if measured else []
        late = [step for step in steps if step >= 0.1 * steps[-1]]
        if len(late) > 1:
            steps = late
        if steps:
            values = {seed: np.array([curve[step] for step in steps], dtype=float) for seed, curve in measured.items()}
            found[arm] = Course(steps, values)  # NaN for null
    return found


def _draw_courses(axes: Axes, courses: Mapping[str, tuple[str, Course]]) -> None:
    """Draws means with bands of one standard deviation, and labels them.

    Args:
        axes: The panel to draw on.
        courses: Name -> activation, and its values.
    """
    tidy(axes)
    ends = []
    for name, (act, course) in courses.items():
        if not (course.steps and course.values):
            continue
        values, style = np.array([*course.values.values()]), look(act)
        middle, width = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(course.steps))
        marked = style if len(course.steps) <= _FEW else {**style, "marker": ""}
        axes.plot(course.steps, middle, **marked, ms=4, lw=1.4)
        axes.fill_between(course.steps, middle - width, middle + width, color=style["color"], alpha=0.1, lw=0)
        ends.append(End(name, course.steps[-1], float(middle[-1]), style["color"]))
    axes.margins(x=0.02)
    label_ends(axes, ends)


def _records(study: Study) -> list[dict[str, Any]]:
    return [record for runs in study.final_runs().values() for run in runs if (record := study.record(run))]


def sensitivity(study: Study) -> Picture:
    """Draws the results of tuning by learning rate: means of activations, with bands from the best to the worst seed.

    Large markers are the means of the final seeds, at the rates at which they ran.
    """
    plan = study.plan
    figure = new_figure(8.5, 4.4)
    axes = figure.subplots()
    tidy(axes)
    finalists = study.final_trials()
    ends = []
    for number, act in enumerate(plan.acts):
        means, style = study.tuned(act), look(act)
        aside = plan.ratio ** (0.4 * ((number + 0.5) / len(plan.acts) - 0.5))  # otherwise large markers would overlap
        tuned = {rate: value for rate, value in means.items() if math.isfinite(value)}
        seeds = np.array([[study.outcome(Run(act, rate, seed)) for rate in tuned] for seed in plan.tuning_seeds])
        axes.plot(list(tuned), list(tuned.values()), **style, ms=4, lw=1.4)
        shade = min(0.15, 0.8 / len(plan.acts))
        axes.fill_between(list(tuned), seeds.min(0), seeds.max(0), color=style["color"], alpha=shade, lw=0)
        lost = [rate for rate in means if rate not in tuned]
        axes.plot(lost, np.full(len(lost), 0.98), "x", color=style["color"], transform=axes.get_xaxis_transform())
        for rate in (rate for name, rate in finalists if name == act):
            runs = [run for seed in plan.final_seeds if study.record(run := Run(act, rate, seed))]
            final = _finite(study.value(run, plan.tuning_metric) for run in runs)
            if final:
                axes.plot(rate * aside, np.mean(final), **{**style, "ls": ""}, ms=9, mfc="white", mew=2)
        if tuned:
            ends.append(End(act, max(tuned), tuned[max(tuned)], style["color"]))
    axes.set(xscale="log", xlabel="learning rate")
    _name_rates(axes, study.rates())
    return _finished(study, axes, plan.tuning_metric, ends)


def _finished(study: Study, axes: Axes, metric: str, ends: Sequence[End]) -> Picture:
    """Labels a figure with one panel, whose y is a metric, and returns its picture."""
    axes.set_ylabel(metric_label(metric, unit_of(study, metric)))
    show_metric(axes.yaxis, metric)
    mark_better(axes, study.plan.higher_is_better)
    label_ends(axes, ends)
    figure = axes.figure
    assert isinstance(figure, Figure)
    return picture_of(figure)


def _name_rates(axes: Axes, rates: Sequence[float]) -> None:
    """Puts ticks at learning rates on a logarithmic axis. They are slanted, since ten of them would overlap."""
    axes.set_xticks(rates, [f"{rate:.3g}" for rate in rates], rotation=45, ha="right", rotation_mode="anchor")
    axes.xaxis.set_minor_locator(NullLocator())


def ablation(study: Study, key: str) -> Picture | None:
    """Draws outcomes of arms and tuning by n or eps. Returns None if no members of a family differ in it."""
    plan = study.plan
    final = {study.choices()[arm][0]: _finite(found.values()) for arm, found in study.outcomes().items()}
    tuned = {act: _finite(study.tuned(act).values()) for act in plan.acts}
    best = {act: [plan.best(values)] for act, values in tuned.items() if values}
    sources: dict[str, tuple[Any, dict[str, Any]]] = {"final seeds": (_lines(final, key), {})}
    if plan.metric == plan.tuning_metric:  # one axis can only show one metric
        sources["tuning"] = _lines(best, key), {"ls": ":", "mfc": "white"}
    if not any(lines for lines, _ in sources.values()):
        return None
    axes = new_figure(7, 4).subplots()
    tidy(axes)
    ends = []
    for source, (lines, style) in sources.items():
        for label, points in lines.items():
            means, bars = _means(points.values())
            drawn = {**_look_of(label), **style}
            axes.errorbar(list(points), means, bars, **drawn)
            ends.append(End(f"{label}: {source}", [*points][-1], means[-1], drawn["color"]))
    axes.set(xlabel=key, xscale="log" if key == "eps" else "linear")
    axes.margins(x=0.08)
    if key == "n":
        axes.set_xticks(sorted({n for lines, _ in sources.values() for points in lines.values() for n in points}))
    else:
        show_scale(axes.xaxis)
    return _finished(study, axes, plan.metric, ends)


def dose(study: Study) -> Picture | None:
    """Draws outcomes by the half point of the gate, divided by the rms of the activations' inputs at the start.

    GEM and E-GEM share a line for each n, and so does SE-GEM, with 95 % t intervals over seeds. Other activations are
    horizontal lines. Returns None if the records do not have the rms, or no members of a family differ in the half
    point.
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
    axes = new_figure(8, 4.4).subplots()
    tidy(axes)
    ends = []
    for label, points in sorted(lines.items()):
        style, ratios = _look_of_dose(label), sorted(points)
        means, bars = _means(points[ratio] for ratio in ratios)
        axes.errorbar(ratios, means, bars if len(points) == 1 else None, **style)
        axes.fill_between(ratios, np.subtract(means, bars), np.add(means, bars), color=style["color"], alpha=0.12, lw=0)
        ends.append(End(label, ratios[-1], means[-1], style["color"]))
    axes.set(xscale="log", xlabel="half point of the gate / rms of its inputs at the start")
    axes.margins(x=0.08)
    show_scale(axes.xaxis)
    right = axes.get_xlim()[1]
    for act, mean in others.items():
        axes.axhline(mean, color=look(act)["color"], ls="--", lw=1)
        ends.append(End(act, right, mean, look(act)["color"]))
    return _finished(study, axes, study.plan.metric, ends)


def _look_of_dose(label: str) -> dict[str, Any]:
    """Returns the look of a line of `dose`. Lines of one family have clearly different colours."""
    family, n = label.split(", n = ")
    half = 10 ** min(1.5 * int(n) - 4, 0.5)
    return look(f"{family.replace('-', '').lower()}_n{n}_eps{half ** (2 * int(n)):g}")


def _dose_of(study: Study, arm: str) -> tuple[str, float] | None:
    """Returns the line of `dose` that an arm belongs to, and its place there.

    Returns None if its records do not contain it, or if its flags change more than eps.
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
    """Returns means, and half the widths of their 95 % t intervals (0 for a single value)."""
    estimates = [(np.array(values), len(values) > 1) for values in groups]
    means = [float(values.mean()) for values, _ in estimates]
    return means, [np.ptp(over_seeds(values).interval()) / 2 if some else 0.0 for values, some in estimates]


def _lines(outcomes: Mapping[str, list[float]], key: str) -> dict[str, dict[float, list[float]]]:
    """Groups outcomes of activations that differ only in n or eps, by its value. Leaves out groups of one value."""
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
    """Returns the look of a line of `_lines`, which is that of the activation with the same fixed n or eps."""
    family, *fixed = label.removesuffix(", learnable").split(", ")
    return look("_".join([family, *(text.replace(" = ", "") for text in fixed)]))


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
