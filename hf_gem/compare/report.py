"""The report of a study: Markdown, and one HTML file with its pictures inside, both made from the records."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import is_name, parse
from ..training.files import write_atomically
from .plan import Run
from .run import Study
from .stats import Comparison, compare, expected_best_of, minimum_detectable_effect, t_interval

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.25rem .6rem;"
    "text-align:left}img{max-width:100%}code{background:#f3f3f3;padding:0 .2rem}"
)


@dataclass
class Table:
    """A table of a report.

    Attributes:
        heads: Of the columns.
        rows: Their cells.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Picture:
    """A picture of a report.

    Attributes:
        name: Of its file.
        title: Beneath it.
        png: The file.
    """

    name: str
    title: str
    png: bytes


Part = str | Table | Picture  # a string that starts with "#" is a heading, others are paragraphs


def write_report(study: Study) -> Path:
    """Writes `report.md`, `report.html`, `results.json` and the pictures into the folder of a study.

    Returns:
        The HTML page.
    """
    plan = study.plan
    comparisons = compare(study.outcomes(), plan.baseline, plan.smallest_effect, plan.higher_is_better, plan.min_seeds)
    parts = _parts(study, comparisons)
    folder = study.folder
    results = {"plan_hash": plan.hash, "choices": study.choices(), "comparisons": [asdict(c) for c in comparisons]}
    write_atomically(folder / "results.json", json.dumps(results, indent=2) + "\n")
    return write_pages(folder, "report", parts)


def write_pages(folder: Path, name: str, parts: Sequence[Part]) -> Path:
    """Writes parts as Markdown with its pictures beside it, and as one HTML page.

    Args:
        folder: Where to.
        name: Of both files, without ending.
        parts: The first of them is the title.

    Returns:
        The HTML page.
    """
    for part in parts:
        if isinstance(part, Picture):
            (folder / part.name).write_bytes(part.png)
    write_atomically(folder / f"{name}.md", markdown(parts))
    write_atomically(folder / f"{name}.html", _html(str(parts[0]).lstrip("# "), parts))
    return folder / f"{name}.html"


def _parts(study: Study, comparisons: list[Comparison]) -> list[Part]:
    plan = study.plan
    outcomes, choices = study.outcomes(), study.choices()
    seeds = plan.final_seeds
    parts: list[Part] = [f"# {plan.name}", *(sentence(c, study) for c in comparisons)]
    if plan.notes:
        parts.append(plan.notes)
    wrong = study.check_pairing()
    parts.append(
        "**Not paired:** " + "; ".join(wrong)
        if wrong
        else f"Arms of a seed had equal initial weights{', each scaled for its activation,' if plan.own_gains else ''} "
        "and saw the same samples in the same order, by the hashes in their records."
    )
    heads = [
        "arm",
        "difference",
        "95 % BCa",
        "95 % t",
        "p sign-flip",
        "p Holm",
        "d_z",
        "r",
        "P(better)",
        "p equivalence",
    ]
    rows = [
        [
            c.arm, signed(c.difference), span(c.interval), span(c.t_interval), f"{c.p:.4g}", f"{c.p_holm:.4g}",
            f"{c.d_z:+.2f}", f"{c.correlation:.2f}", f"{c.superiority:.2f}", f"{c.p_equivalence:.4g}",
            span(c.welch_interval), f"{c.welch_p:.4g}", f"{c.diverged[0]} / {c.diverged[1]}", f"**{c.verdict}**",
            "" if c.further_seeds is None else f"{c.further_seeds:,}",
        ]
        for c in comparisons
    ]  # fmt: skip
    parts += [
        "## Verdicts",
        f"Differences of {plan.metric} from `{plan.baseline}`, over {len(seeds)} planned seeds; "
        f"{'higher' if plan.higher_is_better else 'lower'} is better. Differences below {plan.smallest_effect:g} are "
        f"of no interest. r is the correlation of paired outcomes. With {plan.min_seeds} pairs and more an arm can be "
        "called better or worse. The last column is how many more seeds would settle it, if what was seen were the "
        "truth.",
        Table([*heads, "95 % Welch", "p Welch", "diverged", "verdict", "more seeds"], rows),
        Picture("forest.png", "Mean differences, 95 % intervals; grey: of no interest", _forest(study, comparisons)),
        "## Seeds",
        Table(
            ["arm", "activation", "learning rate", *map(str, seeds), "mean", "sd"],
            [
                [
                    arm, f"`{choices[arm][0]}`", f"{choices[arm][1]:g}", *(number(found.get(seed)) for seed in seeds),
                    number(mean(found)), number(spread(found)),
                ]
                for arm, found in outcomes.items()
            ],
        ),
        Picture("curves.png", "Validation over steps: mean and standard deviation over seeds", _curves(study)),
    ]  # fmt: skip
    for key in ("n", "eps"):
        if (png := _ablation(study, key)) is not None:
            parts.append(Picture(f"{key}.png", f"Outcome by {key}", png))
    if plan.tunes:
        parts += _tuning_parts(study)
    parts += ["## How it was made", *_environment(study)]
    return parts


def sentence(c: Comparison, study: Study) -> str:
    """A comparison in plain words, made from its numbers."""
    plan = study.plan
    low, high = c.t_interval if math.isnan(c.interval[0]) else c.interval
    direction = "above" if c.difference > 0 else "below"
    start = (
        f"On {len(c.seeds)} seeds, {plan.metric} of `{c.arm}` was {abs(c.difference):.4g} {direction} that of "
        f"`{plan.baseline}` (95 % interval {low:+.4g} to {high:+.4g}, p = {c.p_holm:.2g} after Holm)"
    )
    ends = {
        "better": "it is better",
        "worse": "it is worse",
        "equivalent": f"the two are equivalent, to within {plan.smallest_effect:g}",
        "inconclusive": "this settles nothing",
    }
    end = ends[c.verdict]
    if len(c.seeds) < plan.min_seeds:
        end += f", for a verdict takes {plan.min_seeds} seeds"
    elif c.further_seeds is not None:
        end += f"; {c.further_seeds:,} more seeds would, if what was seen were the truth"
    elif c.verdict == "inconclusive":
        end += ", and no affordable number of seeds would, if what was seen were the truth"
    diverged = f" {c.diverged[0]} of its runs diverged, {c.diverged[1]} of the baseline's." if any(c.diverged) else ""
    return f"{start}: {end}.{diverged}"


def _tuning_parts(study: Study) -> list[Part]:
    plan = study.plan
    rows = []
    for arm, acts in plan.arms.items():
        trials = [value for act in acts for value in study.tuned(act).values() if math.isfinite(value)]
        best = plan.best(trials)
        few = ", ".join(f"{k}: {expected_best_of(trials, k, plan.higher_is_better):.4f}" for k in (1, 2, 4))
        rows.append([arm, str(len(trials)), f"{best:.4f}", few])
    parts: list[Part] = [
        "## Tuning",
        f"Over seeds {', '.join(map(str, plan.tuning_seeds))}, which are none of those above. Every arm had the same "
        "grid of learning rates, which was extended for all where the best of one lay at its edge.",
        Table(["arm", "trials", "best", "expected best of k trials"], rows),
        Picture("tuning.png", "Sensitivity to the learning rate", _sensitivity(study)),
    ]
    return parts


def _environment(study: Study) -> list[Part]:
    plan = study.plan
    runs = [run for runs in study.final_runs().values() for run in runs]
    records = [record for run in runs if (record := study.record(run))]
    session = records[0]["sessions"][-1]
    seconds = study.seconds()
    versions = ", ".join(f"{name} {version}" for name, version in session["versions"].items())
    effect = minimum_detectable_effect(len(plan.final_seeds), len(plan.arms) - 1)
    hardware = ", ".join(session["hardware"]["gpus"]) or session["hardware"]["cpu"]
    facts = [
        ["plan", f"`{plan.hash[:16]}`, frozen before the first run"],
        ["recipe", f"`{plan.recipe}`, preset `{plan.preset}`, {' '.join(f'`{k}={v}`' for k, v in plan.flags.items())}"],
        ["data", f"`{records[0]['config']['dataset']}`, SHA-256 `{records[0]['data']['hash'][:16]}`"],
        ["commit", f"{session['commit']}{', with uncommitted changes' if session['dirty'] else ''}"],
        ["versions", versions],
        ["hardware", hardware],
        ["cost", f"{len(seconds)} runs, {sum(seconds) / 3600:.2f} hours in all"],
        ["detectable", f"{effect:.2f} standard deviations of paired differences, with power 0.8"],
    ]  # fmt: skip
    table = [
        [
            run.name, record["status"], number(study.outcome(run)), f"{record['sessions'][-1]['seconds']:,.0f} s",
            f"`{record['init_hash'][:8]}`", f"`{record['order_hash'][:8]}`",
        ]
        for run in runs if (record := study.record(run))
    ]  # fmt: skip
    return [
        Table(["", ""], facts),
        Table(["run", "status", plan.metric, "time", "weights", "order"], table),
    ]


# ---- numbers


def number(value: float | None) -> str:
    return "-" if value is None else "diverged" if not math.isfinite(value) else f"{value:.4f}"


def signed(value: float) -> str:
    return f"{value:+.4g}"


def span(interval: tuple[float, float]) -> str:
    """An interval in a cell."""
    return "-" if math.isnan(interval[0]) else f"{interval[0]:+.4g} to {interval[1]:+.4g}"


def _finite(found: dict[int, float]) -> list[float]:
    return [value for value in found.values() if math.isfinite(value)]


def mean(found: dict[int, float]) -> float | None:
    return float(np.mean(_finite(found))) if _finite(found) else None


def spread(found: dict[int, float]) -> float | None:
    return float(np.std(_finite(found), ddof=1)) if len(_finite(found)) > 1 else None


# ---- pictures


def new_figure(width: float, height: float) -> Any:
    """A figure, in inches, and its axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), dpi=110, layout="constrained")


def png_of(figure: Any) -> bytes:
    """The file of a figure, which is closed."""
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, metadata={"Software": None})  # the same bytes for the same numbers
    plt.close(figure)
    return buffer.getvalue()


def _forest(study: Study, comparisons: list[Comparison]) -> bytes:
    figure, axes = new_figure(7, 1.2 + 0.5 * len(comparisons))
    effect = study.plan.smallest_effect
    axes.axvspan(-effect, effect, color="0.9")
    axes.axvline(0, color="0.5", lw=0.8)
    for row, c in enumerate(comparisons):
        axes.plot(c.interval, (row, row), color="C0", lw=2)
        axes.plot(np.subtract(c.values, c.baseline), np.full(len(c.seeds), row - 0.2), ".", color="0.6", ms=4)
        axes.plot(c.difference, row, "o", color="C0")
    axes.set_yticks(range(len(comparisons)), [f"{c.arm}: {c.verdict}" for c in comparisons])
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.invert_yaxis()
    axes.set_xlabel(f"{study.plan.metric}, difference from {study.plan.baseline}")
    return png_of(figure)


def _curves(study: Study) -> bytes:
    figure, axes = new_figure(7, 4.2)
    key = study.plan.metric
    for number, (arm, runs) in enumerate(study.final_runs().items()):
        curves = [dict(map(tuple, record["curves"][key])) for run in runs if (record := study.record(run))]
        steps = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        mean, spread = values.mean(0), values.std(0, ddof=1)
        axes.plot(steps, mean, color=f"C{number}", label=arm)
        axes.fill_between(steps, mean - spread, mean + spread, color=f"C{number}", alpha=0.2, lw=0)
    axes.set(xlabel="step", ylabel=key)
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


def _sensitivity(study: Study) -> bytes:
    figure, axes = new_figure(7, 4.2)
    for act in study.plan.acts:
        tuned = {rate: value for rate, value in study.tuned(act).items() if math.isfinite(value)}
        axes.plot(list(tuned), list(tuned.values()), "o-", label=act)
        for seed in study.plan.tuning_seeds:
            points = [(rate, study.outcome(Run(act, rate, seed))) for rate in tuned]
            axes.plot(*zip(*points, strict=True), ".", color="0.7", ms=3)
    axes.set(xscale="log", xlabel="learning rate", ylabel=study.plan.metric)
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


def _ablation(study: Study, key: str) -> bytes | None:
    """Outcomes by n or eps, of the arms and of tuning, where members of a family differ in it; None where none do."""
    plan = study.plan
    final = {study.choices()[arm][0]: _finite(found) for arm, found in study.outcomes().items()}
    tuned = {act: [value for value in study.tuned(act).values() if math.isfinite(value)] for act in plan.acts}
    best = {act: [plan.best(values)] for act, values in tuned.items() if values}
    sources = {"final seeds, 95 % t": (_lines(final, key), "o-"), "best of tuning": (_lines(best, key), ".:")}
    if not any(lines for lines, _ in sources.values()):
        return None
    figure, axes = new_figure(6, 4)
    colors: dict[str, str] = {}
    for source, (lines, style) in sources.items():
        for label, points in lines.items():
            color = colors.setdefault(label, f"C{len(colors)}")
            means = [float(np.mean(values)) for values in points.values()]
            bars = [np.ptp(t_interval(np.array(values))) / 2 if len(values) > 1 else 0 for values in points.values()]
            axes.errorbar(list(points), means, bars, fmt=style, color=color, label=f"{label}: {source}")
    axes.set(xlabel=key, ylabel=plan.metric, xscale="log" if key == "eps" else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    return png_of(figure)


def _lines(outcomes: Mapping[str, list[float]], key: str) -> dict[str, dict[float, list[float]]]:
    """Outcomes of the activations that differ in n or eps alone, by its value; only where there are two or more."""
    lines: dict[str, dict[float, list[float]]] = {}
    for act, values in outcomes.items():
        if is_name(act) and values:
            spec = parse(act)
            if spec.family != "gem" or key == "n":
                fixed = f"eps = {spec.eps:g}" if key == "n" else f"n = {spec.n}"
                label = spec.family if spec.family == "gem" else f"{spec.family}, {fixed}"
                lines.setdefault(label, {})[float(getattr(spec, key))] = values
    return {label: dict(sorted(points.items())) for label, points in lines.items() if len(points) > 1}


# ---- writing


def markdown(parts: Sequence[Part]) -> str:
    text = []
    for part in parts:
        if isinstance(part, Table):
            lines = [part.heads, ["---"] * len(part.heads), *part.rows]
            text.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        else:
            text.append(f"![{part.title}]({part.name})" if isinstance(part, Picture) else part)
    return "\n\n".join(text) + "\n"


def _html(title: str, parts: Sequence[Part]) -> str:
    body = []
    for part in parts:
        if isinstance(part, Table):
            rows = [("th", part.heads), *(("td", row) for row in part.rows)]
            cells = ["".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in row) for tag, row in rows]
            body.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        elif isinstance(part, Picture):
            data = base64.b64encode(part.png).decode()
            caption = f"<figcaption>{_inline(part.title)}</figcaption>"
            body.append(
                f'<figure><img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">{caption}</figure>'
            )
        elif part.startswith("#"):
            level = len(part) - len(part.lstrip("#"))
            body.append(f"<h{level}>{_inline(part.lstrip('# '))}</h{level}>")
        else:
            body.append(f"<p>{_inline(part)}</p>")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
    return f"{head}<style>{_STYLE}</style>\n" + "\n".join(body) + "\n</html>\n"


def _inline(text: str) -> str:
    """Code and emphasis of Markdown, which is all that reports use."""
    for mark, tag in (("`", "code"), ("**", "strong")):
        pieces = (html.escape(text) if mark == "`" else text).split(mark)
        text = "".join(f"<{tag}>{piece}</{tag}>" if k % 2 else piece for k, piece in enumerate(pieces))
    return text
