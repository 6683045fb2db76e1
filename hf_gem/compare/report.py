"""The report of a study: Markdown, and one HTML file with its pictures inside, both made from the records."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..spec import is_name, parse
from ..training.files import write_atomically
from .plan import Plan, Run
from .run import Study
from .stats import Comparison, expected_best_of, minimum_detectable_effect, t_interval

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
    comparisons = study.comparisons()
    parts = _parts(study, comparisons)
    folder = study.folder
    results = {"plan_hash": plan.hash, "choices": study.choices(), "comparisons": [asdict(c) for c in comparisons]}
    write_atomically(folder / "results.json", json.dumps(_without_nan(results), indent=2, allow_nan=False) + "\n")
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
    if missing := study.missing():
        parts.append(f"**Not finished:** {len(missing)} runs are missing, such as {missing[0].name}.")
    parts.append(pairing(study))
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
        "called better or worse; p of equivalence is not adjusted for the number of arms. The last column is how many "
        "more seeds would settle it, if what was seen were the truth.",
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
        Picture("curves.png", "Validation of finished runs over steps: mean and standard deviation", _curves(study)),
    ]  # fmt: skip
    for key in ("n", "eps"):
        if (png := _ablation(study, key)) is not None:
            parts.append(Picture(f"{key}.png", f"Outcome by {key}", png))
    if plan.tunes:
        parts += _tuning_parts(study)
    parts += ["## How it was made", *_environment(study)]
    return parts


def pairing(study: Study) -> str:
    """In what the arms of a seed were alike, by the hashes in their records."""
    if wrong := study.check_pairing():
        return "**Not paired:** " + "; ".join(wrong)
    scaled = ", each scaled for its activation," if study.plan.own_gains else ""
    return (
        f"Arms of a seed had equal initial weights{scaled} and saw the same samples in the same order, by the hashes "
        "in their records; they differ in the activation and in the learning rate that suits it."
    )


def detectable(plan: Plan) -> str:
    """What differences the planned seeds can find."""
    seeds, arms = len(plan.final_seeds), len(plan.arms) - 1
    effect = minimum_detectable_effect(seeds, arms)
    if seeds < plan.min_seeds or math.isinf(effect):
        return f"No difference, however large, is called better or worse with {seeds} seeds for {arms + 1} arms"
    return f"A true difference of {effect:.2f} standard deviations of paired differences is found with power 0.8"


def sentence(c: Comparison, study: Study) -> str:
    """A comparison in plain words, made from its numbers."""
    plan = study.plan
    if len(c.seeds) < 2:
        return (
            f"{c.diverged[0]} runs of `{c.arm}` and {c.diverged[1]} of `{plan.baseline}` diverged, which leaves "
            f"{len(c.seeds)} seeds to compare: it is {c.verdict}."
        )
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
    if c.verdict == "inconclusive" and c.further_seeds is None and c.diverged[0] != c.diverged[1]:
        end += ", for one of the two diverged more often"
    elif len(c.seeds) < plan.min_seeds:
        end += f", for a verdict takes {plan.min_seeds} seeds"
    elif c.further_seeds is not None:
        end += f"; {c.further_seeds:,} more seeds would, if what was seen were the truth"
    elif c.verdict == "inconclusive":
        end += ", and no affordable number of seeds would, if what was seen were the truth"
    diverged = f" {c.diverged[0]} of its runs diverged, {c.diverged[1]} of the baseline's." if any(c.diverged) else ""
    return f"{start}: {end}.{diverged}"


def _tuning_parts(study: Study) -> list[Part]:
    plan = study.plan
    rows, choices = [], study.choices()
    worst = -math.inf if plan.higher_is_better else math.inf
    for arm, acts in plan.arms.items():
        tuned = {act: study.tuned(act) for act in acts}
        act, rate = choices[arm]
        trials = [value if math.isfinite(value) else worst for means in tuned.values() for value in means.values()]
        few = ", ".join(f"{k}: {number(expected_best_of(trials, k, plan.higher_is_better))}" for k in (1, 2, 4))
        edge = " (the edge of the grid)" if len(tuned[act]) > 1 and rate in (min(tuned[act]), max(tuned[act])) else ""
        diverged = sum(map(math.isinf, trials))
        rows.append(
            [arm, f"`{act}`", f"{rate:g}{edge}", str(len(trials)), str(diverged), number(plan.best(trials)), few]
        )
    flags = " ".join(f"`{key}={value}`" for key, value in plan.tuning_flags.items())
    samples = (
        f"Tuning runs had {flags}."
        if flags
        else "Tuning and comparison are evaluated on the same samples: an arm with more trials than another had more "
        "chances to suit them."
    )
    return [
        "## Tuning",
        f"Over seeds {', '.join(map(str, plan.tuning_seeds))}, which are none of those above. Every arm had the same "
        "grid of learning rates, which was extended for all where the best of one lay at its edge. "
        f"{samples}",
        Table(["arm", "chosen", "learning rate", "trials", "diverged", "best", "expected best of k trials"], rows),
        Picture("tuning.png", "Sensitivity to the learning rate", _sensitivity(study)),
    ]


def _environment(study: Study) -> list[Part]:
    plan = study.plan
    runs = [run for runs in study.final_runs().values() for run in runs]
    records = [record for run in runs if (record := study.record(run))]
    sessions = [session for record in records for session in record["sessions"]]
    seconds = study.seconds()

    def all_of(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    facts = [
        ["plan", f"`{plan.hash[:16]}`, frozen before the first run"],
        ["recipe", f"`{plan.recipe}`, preset `{plan.preset}`, {' '.join(f'`{k}={v}`' for k, v in plan.flags.items())}"],
        ["data", all_of(f"`{r['config']['dataset']}`, SHA-256 `{r['data']['hash'][:16]}`" for r in records)],
        ["commit", all_of(f"{s['commit']}{', with uncommitted changes' if s['dirty'] else ''}" for s in sessions)],
        ["versions", all_of(", ".join(f"{name} {v}" for name, v in s["versions"].items()) for s in sessions)],
        ["hardware", all_of(", ".join(s["hardware"]["gpus"]) or s["hardware"]["cpu"] for s in sessions)],
        ["cost", f"{len(seconds)} runs, {sum(seconds) / 3600:.2f} hours in all"],
        ["power", detectable(plan)],
    ]  # fmt: skip
    table = [
        [
            run.name, record["status"], number(study.outcome(run)),
            f"{sum(session['seconds'] for session in record['sessions']):,.0f} s",
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


def _without_nan(value: Any) -> Any:
    """With null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
    for row, (arm, runs) in enumerate(study.final_runs().items()):
        finished = [r for run in runs if (r := study.record(run)) and math.isfinite(study.outcome(run))]
        if not finished:
            continue
        curves = [dict(map(tuple, record["curves"][key])) for record in finished]
        steps = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        middle, width = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
        axes.plot(steps, middle, color=f"C{row}", label=arm)
        axes.fill_between(steps, middle - width, middle + width, color=f"C{row}", alpha=0.2, lw=0)
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
                label += ", learnable" if spec.learnable else ""
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
