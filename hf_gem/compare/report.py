"""The report of a study: Markdown, and one HTML file with its pictures inside, both made from the records."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..family.names import is_name, parse
from ..files import to_json, write_atomically
from .plan import Plan, Run
from .stats import Comparison, expected_best_of, minimum_detectable_effect, t_interval
from .study import Study

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


def write_report(study: Study, baseline: str | None = None) -> Path:
    """Writes `report.md`, `report.html`, `results.json` and the pictures into the folder of a study.

    Args:
        study: With a finished tuning.
        baseline: Another arm than that of the plan; the report then goes into the folder `against-<baseline>` there.

    Returns:
        The HTML page.

    Raises:
        PlanError: the baseline is no arm.
    """
    plan, folder = study.plan, study.folder
    if baseline is not None and baseline != plan.baseline:
        plan.require_arm(baseline)
        folder = folder / f"against-{baseline}"
        folder.mkdir(exist_ok=True)
    comparisons = study.comparisons(baseline)
    parts = _parts(study, comparisons, baseline or plan.baseline)
    results = {"plan_hash": plan.hash, "choices": study.choices(), "comparisons": [asdict(c) for c in comparisons]}
    write_atomically(folder / "results.json", to_json(results, indent=2) + "\n")
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


def _parts(study: Study, comparisons: list[Comparison], baseline: str) -> list[Part]:
    plan = study.plan
    outcomes, choices = study.outcomes(), study.choices()
    seeds = plan.final_seeds
    parts: list[Part] = [f"# {plan.name}", *(sentence(c, plan, baseline) for c in comparisons)]
    if baseline != plan.baseline:
        parts.append(f"The plan had named `{plan.baseline}` as the baseline, so this looks at the same runs once more.")
    if plan.notes:
        parts.append(plan.notes)
    if missing := study.missing():
        parts.append(f"**Not finished:** {len(missing)} runs are missing, such as {missing[0].name}.")
    if mixed := study.mixtures():
        parts.append(f"**Mixed:** {'; '.join(mixed)}.")
    for (act, rate), values in study.set_aside().items():
        found = dict(enumerate(values))
        parts.append(
            f"**Set aside:** {len(values)} runs of `{act}` at {rate:g} on the final seeds, with a mean of "
            f"{number(mean(found))}. They ran before the tuning had ended, which chose otherwise."
        )
    parts.append(pairing(study))
    if plan.tunes and (chancy := [f"`{arm}`" for arm in plan.arms if _by_chance(study, arm)]):
        parts.append(
            f"In tuning, the second best of {', '.join(chancy)} was nearer than the seeds of the best were to each "
            "other: what was chosen there is a choice of chance."
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
            *(cell(value, form) for value, form in ((c.d_z, "+.2f"), (c.correlation, ".2f"), (c.superiority, ".2f"),
                                                    (c.p_equivalence, ".4g"))),
            span(c.welch_interval), cell(c.welch_p, ".4g"), f"{c.diverged[0]} / {c.diverged[1]}", f"**{c.verdict}**",
            "" if c.further_seeds is None else f"{c.further_seeds:,}",
        ]
        for c in comparisons
    ]  # fmt: skip
    parts += [
        "## Verdicts",
        f"Differences of {plan.metric} from `{baseline}`, over {len(seeds)} planned seeds; "
        f"{'higher' if plan.higher_is_better else 'lower'} is better. Differences below {plan.smallest_effect:g} are "
        "of no interest. The sign-flip test decides, adjusted by Holm for the number of arms; a run that diverged "
        "counts there as worse than any that did not. Intervals, p of Welch and p of equivalence are not adjusted. r "
        f"is the correlation of paired outcomes. With {plan.min_seeds} pairs and more an arm can be called better or "
        "worse. The last column is how many more seeds would settle it with power 0.8, if what was seen were the "
        "truth; they belong into a new study, for one that is extended until it shows something shows it too often.",
        Table([*heads, "95 % Welch", "p Welch", "diverged", "verdict", "more seeds"], rows),
        Picture("forest.png", "Mean differences, 95 % intervals, seeds; grey: of no interest",
                _forest(plan, comparisons, baseline)),
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
            tuned = f"; tuning: mean of {len(plan.tuning_seeds)} other seeds at their best rate" if plan.tunes else ""
            parts.append(Picture(f"{key}.png", f"Outcome by {key}; bars: 95 % t of the mean{tuned}", png))
    if plan.tunes:
        parts += _tuning_parts(study)
    parts += ["## How it was made", *_environment(study, comparisons)]
    return parts


_HASHED = {
    "init_hash": "initial weights",
    "init_signs_hash": "the signs of initial weights",
    "order_hash": "the order of samples",
    "samples_hash": "the first samples as the model saw them",
}


def pairing(study: Study) -> str:
    """In what the arms of a seed were alike, by the hashes in their records."""
    if wrong := study.check_pairing():
        return "**Not paired:** " + "; ".join(wrong)
    plan = study.plan
    scaled = ", each scaled for its activation," if plan.own_gains else ""
    rate = f" and in the learning rate, which {len(plan.tuning_seeds)} other seeds have chosen" if plan.tunes else ""
    text = (
        f"Arms of a seed had equal initial weights{scaled} and saw the same samples in the same order; they differ in "
        f"the activation{rate}. The hashes in their records are equal, of "
        f"{_listed([_HASHED[key] for key in study.hashes()])}."
    )
    if seeds := study.hardware_differs():
        text += f" Of {len(seeds)} seeds not all arms ran on the same hardware."
    return text


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def detectable(plan: Plan, comparisons: Sequence[Comparison] = ()) -> str:
    """What differences the planned seeds can find; in the unit of the metric, where comparisons tell their spread."""
    seeds, arms = len(plan.final_seeds), len(plan.arms) - 1
    effect = minimum_detectable_effect(seeds, arms)
    if seeds < plan.min_seeds or math.isinf(effect):
        return f"No difference, however large, is called better or worse with {seeds} seeds for {arms + 1} arms"
    text = f"A true difference of {effect:.2f} standard deviations of paired differences is found with power 0.8"
    if spreads := [effect * np.subtract(c.values, c.baseline).std(ddof=1) for c in comparisons if len(c.seeds) > 1]:
        text += f"; with those seen here, one of {min(spreads):.2g} to {max(spreads):.2g}"
    return text


def sentence(c: Comparison, plan: Plan, baseline: str) -> str:
    """A comparison in plain words, made from its numbers."""
    ends = {
        "better": "it is better",
        "worse": "it is worse",
        "equivalent": f"the two are equivalent, to within {plan.smallest_effect:g}",
        "inconclusive": "this settles nothing",
        "pending": "runs are missing, and there is no verdict before they are done",
    }
    end = ends[c.verdict]
    if c.verdict == "inconclusive":
        if c.pairs < plan.min_seeds:
            end += f", for a verdict takes {plan.min_seeds} seeds"
        elif c.barred:
            end += ", for the one with the better mean diverged more often"
        elif c.further_seeds is not None:
            end += f"; {c.further_seeds:,} more seeds would, with power 0.8, if what was seen were the truth"
        else:
            end += ", and no affordable number of seeds would, if what was seen were the truth"
    diverged = f"{c.diverged[0]} runs of `{c.arm}` and {c.diverged[1]} of `{baseline}` diverged"
    if len(c.seeds) < 2:
        return f"{diverged}, and {len(c.seeds)} seeds finished at both (p = {c.p_holm:.2g} after Holm): {end}."
    low, high = c.t_interval if math.isnan(c.interval[0]) else c.interval
    return (
        f"On {len(c.seeds)} seeds, {plan.metric} of `{c.arm}` was {abs(c.difference):.4g} "
        f"{'above' if c.difference > 0 else 'below'} that of `{baseline}` (95 % interval of this comparison alone "
        f"{low:+.4g} to {high:+.4g}; p = {c.p:.2g}, and {c.p_holm:.2g} after Holm, which decides): {end}."
        + (f" {diverged}." if any(c.diverged) else "")
    )


def _tuning_spread(study: Study, arm: str) -> float | None:
    act, rate = study.choices()[arm]
    return spread({seed: study.outcome(Run(act, rate, seed)) for seed in study.plan.tuning_seeds})


def _by_chance(study: Study, arm: str) -> bool:
    """Whether the second best of an arm in tuning was nearer than the seeds of the best were to each other."""
    second, apart = study.runner_up(arm), _tuning_spread(study, arm)
    return second is not None and apart is not None and abs(second[1] - study.trials(arm)[study.choices()[arm]]) < apart


def _tuning_parts(study: Study) -> list[Part]:
    plan = study.plan
    rows, choices = [], study.choices()
    for arm, (act, rate) in choices.items():
        means, second = study.trials(arm), study.runner_up(arm)
        finished = [mean for mean in means.values() if math.isfinite(mean)]
        tries = [k for k in (1, 2, 4, 8, 16) if k < len(finished)] + [len(finished)] if finished else []
        few = ", ".join(f"{k}: {number(expected_best_of(finished, k, plan.higher_is_better))}" for k in tries)
        rates = [rate for other, rate in means if other == act]
        edge = " (the edge of the grid)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        rows.append(
            [
                arm, f"`{act}`", f"{rate:g}{edge}", number(means[act, rate]), number(_tuning_spread(study, arm)),
                f"`{second[0][0]}` {second[0][1]:g}: {number(second[1])}" if second else "-",
                str(len(means)), str(len(means) - len(finished)), few,
            ]
        )  # fmt: skip
    flags = " ".join(f"`{key}={value}`" for key, value in plan.tuning_flags.items())
    samples = (
        f"Tuning runs had {flags}."
        if flags
        else "Tuning and comparison are evaluated on the same samples: an arm with more trials than another had more "
        "chances to suit them."
    )
    heads = ["arm", "chosen", "learning rate", "mean", "sd"]
    return [
        "## Tuning",
        f"Over seeds {', '.join(map(str, plan.tuning_seeds))}, which are none of those above. Every arm had the same "
        f"grid of learning rates, which was extended for all where the best of one lay at its edge. {samples} Where "
        "the second best is nearer than the seeds are to each other (sd), the choice is one of chance; intervals and p "
        "above are of the chosen rates, and do not know that others might have been chosen.",
        Table([*heads, "second best", "trials", "diverged", "expected best of k that finish"], rows),
        Picture("tuning.png", "Sensitivity to the learning rate; a cross: diverged", _sensitivity(study)),
    ]


def _environment(study: Study, comparisons: Sequence[Comparison]) -> list[Part]:
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
        ["power", detectable(plan, comparisons)],
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


def cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def signed(value: float) -> str:
    return cell(value, "+.4g")


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


def forest(rows: Mapping[str, tuple[float, tuple[float, float], Sequence[float]]], band: float, label: str) -> bytes:
    """A picture of intervals, one beneath the other.

    Args:
        rows: Name -> the middle, the interval, and points to draw beneath it.
        band: Half the width of what is of no interest, around 0.
        label: Of the axis.
    """
    figure, axes = new_figure(7, 1.2 + 0.5 * len(rows))
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
    return png_of(figure)


def _forest(plan: Plan, comparisons: list[Comparison], baseline: str) -> bytes:
    rows = {
        f"{c.arm}: {c.verdict}": (c.difference, c.interval, np.subtract(c.values, c.baseline).tolist())
        for c in comparisons
    }
    return forest(rows, plan.smallest_effect, f"{plan.metric}, difference from {baseline}")


def _curves(study: Study) -> bytes:
    figure, axes = new_figure(7, 4.2)
    key = study.plan.metric
    for row, (arm, runs) in enumerate(study.final_runs().items()):
        finished = [r for run in runs if (r := study.record(run)) and math.isfinite(study.outcome(run))]
        if not finished:
            continue
        curves = [dict(map(tuple, record["curves"][key])) for record in finished]
        steps = sorted(set.intersection(*map(set, curves)))
        steps = steps[1:] if len(steps) > 2 else steps  # before any training all are alike, and far from what follows
        values = np.array([[curve[step] for step in steps] for curve in curves], dtype=float)  # NaN for null
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
        means = study.tuned(act)
        tuned = {rate: value for rate, value in means.items() if math.isfinite(value)}
        (line,) = axes.plot(list(tuned), list(tuned.values()), "o-", label=act)
        for seed in study.plan.tuning_seeds:
            axes.plot(list(tuned), [study.outcome(Run(act, rate, seed)) for rate in tuned], ".", color="0.7", ms=3)
        lost = [rate for rate in means if rate not in tuned]
        axes.plot(lost, np.full(len(lost), 0.98), "x", color=line.get_color(), transform=axes.get_xaxis_transform())
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
    sources = {"final seeds": (_lines(final, key), "o-"), "tuning": (_lines(best, key), ".:")}
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
    if key == "n":
        axes.set_xticks(sorted({n for lines, _ in sources.values() for points in lines.values() for n in points}))
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
