"""Makes the report of a study from its records. The text is in `templates/report.md.j2`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import markdown_code as code
from ..files import markdown_text as text
from ..files import to_json, write_atomically
from ..training.errors import needed_for
from .estimates import expected_best_of
from .plan import Run, slug
from .preview import detectable
from .sample import sample_of
from .stats import Comparison
from .study import Study
from .words import cell, mean, number, render, signed, span, spread


def write_report(study: Study, baseline: str | None = None) -> Path:
    """Writes `report.md`, `report.html`, `results.json` and the pictures into the folder of a study.

    Args:
        study: A study whose tuning is finished.
        baseline: An arm to use as the baseline instead of the plan's. The report then goes into the subfolder
            `against-<baseline>`.

    Returns:
        The path of the HTML page.

    Raises:
        PlanError: The baseline is not an arm.
        ConfigError: A package that reports need is not installed.
    """
    plan, folder = study.plan, study.folder
    with needed_for(f"the runs are saved in {folder}, but their report"):
        import scipy  # noqa: F401  # the verdicts and the labels of lines import it, but too late for this error

        from . import figures, pages
    baseline = None if baseline == plan.baseline else baseline
    if baseline is not None:
        plan.require_arm(baseline)
        folder = folder / f"against-{slug(baseline)}"
        folder.mkdir(exist_ok=True)
    families = [_family(study, name) for name in ([baseline] if baseline else [plan.baseline, *plan.further_baselines])]
    pictures = figures.of_study(study, {family.baseline: (family.picture, family.comparisons) for family in families})
    first, *further = families
    page = render(
        "report.md.j2",
        study=study,
        plan=plan,
        families=families,
        baseline=first.baseline,
        sample=sample_of(study),
        missing=study.missing(),
        mixed=study.mixtures(),
        set_aside=[(*key, len(found), mean(dict(enumerate(found)))) for key, found in study.set_aside().items()],
        by_chance=[f"`{arm}`" for arm in plan.arms if plan.tunes and plan.final_rates == 1 and _by_chance(study, arm)],
        outcomes=_outcomes(study),
        ablations=[key for key in ("n", "eps") if f"{key}.png" in pictures],
        dose="dose.png" in pictures,
        trials=_trials(study) if plan.tunes else [],
        finalists=_finalists(study),
        facts=_facts(study),
        detectable=detectable(plan, first.comparisons),
        runs=_runs(study),
    )
    results = {
        "plan_hash": plan.hash,
        "choices": study.choices(),
        "comparisons": [asdict(c) for c in first.comparisons],
        **({"further": {f.baseline: [asdict(c) for c in f.comparisons] for f in further}} if further else {}),
    }
    write_atomically(folder / "results.json", to_json(results, indent=2) + "\n")
    return pages.write_pages(folder, "report", page, pictures)


@dataclass(frozen=True)
class _Family:
    """All other arms against one baseline: a family of hypotheses, adjusted together.

    Attributes:
        baseline: The baseline arm.
        comparisons: Comparisons of the other arms with the baseline.
        picture: File name of its forest plot.
    """

    baseline: str
    comparisons: list[Comparison]
    picture: str

    @property
    def counts_sample(self) -> bool:
        """Whether the intervals count the evaluation sample."""
        return any(c.components for c in self.comparisons)

    def verdicts(self) -> list[list[str]]:
        """Returns the rows of the table of verdicts."""
        return [
            [
                c.arm, f"**{c.verdict}**", signed(c.difference), span(c.interval), span(c.adjusted_interval),
                f"{c.p_holm:.4g}", f"{c.p_equivalence_holm:.4g}", f"{c.diverged[0]} / {c.diverged[1]}",
                "" if c.further_seeds is None else f"{c.further_seeds:,}",
            ]
            for c in self.comparisons
        ]  # fmt: skip

    def details(self) -> list[list[str]]:
        """Returns the rows of the table of details."""
        return [
            [
                c.arm, f"{c.p:.4g}", *([cell(c.p_two_way, ".4g")] if self.counts_sample else []),
                cell(c.p_equivalence, ".4g"), span(c.t_interval), cell(c.d_z, "+.2f"), cell(c.correlation, ".2f"),
                cell(c.superiority, ".2f"), span(c.welch_interval), cell(c.welch_p, ".4g"),
            ]
            for c in self.comparisons
        ]  # fmt: skip

    def variances(self, unit: str) -> list[list[str]]:
        """Returns the rows of the table of variance components."""
        rows = []
        for c in self.comparisons:
            if c.components and c.components.variance:
                parts = c.components
                shares = (f"{100 * part / parts.variance:.0f} %" for part in (parts.seeds, parts.groups, parts.both))
                limit = parts.limited_by if parts.limited_by == "seeds" else unit
                rows.append([c.arm, f"{parts.estimate.error:.2g}", *shares, limit])
        return rows


def _family(study: Study, baseline: str) -> _Family:
    picture = "forest.png" if baseline == study.plan.baseline else f"forest-against-{slug(baseline)}.png"
    return _Family(baseline, study.comparisons(baseline), picture)


def _outcomes(study: Study) -> list[list[str]]:
    choices, seeds = study.choices(), study.plan.final_seeds
    return [
        [
            arm, code(choices[arm][0]), f"{choices[arm][1]:g}", *(number(found.get(seed)) for seed in seeds),
            number(mean(found)), number(spread(found)),
        ]
        for arm, found in study.outcomes().items()
    ]  # fmt: skip


def _tuning_spread(study: Study, arm: str) -> float | None:
    act, rate = study.choices()[arm]
    return spread({seed: study.outcome(Run(act, rate, seed)) for seed in study.plan.tuning_seeds})


def _by_chance(study: Study, arm: str) -> bool:
    """Returns whether the gap between an arm's two best rates in tuning is smaller than the spread of the seeds."""
    second, apart = study.runner_up(arm), _tuning_spread(study, arm)
    return second is not None and apart is not None and abs(second[1] - study.trials(arm)[study.choices()[arm]]) < apart


def _trials(study: Study) -> list[list[str]]:
    plan, rows = study.plan, []
    for arm, (act, rate) in study.choices().items():
        means, second = study.trials(arm), study.runner_up(arm)
        finished = [mean for mean in means.values() if math.isfinite(mean)]
        tries = [k for k in (1, 2, 4, 8, 16) if k < len(finished)] + [len(finished)] if finished else []
        few = ", ".join(f"{k}: {number(expected_best_of(finished, k, plan.higher_is_better))}" for k in tries)
        rates = [rate for other, rate in means if other == act]
        edge = " (the edge of the grid)" if len(rates) > 1 and rate in (min(rates), max(rates)) else ""
        rows.append(
            [
                arm, code(act), f"{rate:g}{edge}", number(means[act, rate]), number(_tuning_spread(study, arm)),
                f"{code(second[0][0])} {second[0][1]:g}: {number(second[1])}" if second else "-",
                str(len(means)), str(len(means) - len(finished)), few,
            ]
        )  # fmt: skip
    return rows


def _finalists(study: Study) -> list[list[str]]:
    """Returns the rows of the table that compares the two rates of each arm that ran on the final seeds."""
    plan, rows = study.plan, []
    for arm, trials in study.finalists().items() if plan.final_rates > 1 else ():
        for act, rate in trials:
            runs = [Run(act, rate, seed) for seed in (*plan.tuning_seeds, *plan.final_seeds)]
            values = {run.seed: study.value(run, plan.tuning_metric) for run in runs if study.record(run)}
            tuning = {seed: value for seed, value in values.items() if seed in plan.tuning_seeds}
            final = {seed: value for seed, value in values.items() if seed in plan.final_seeds}
            means = [number(mean(found)) if found else "-" for found in (tuning, final, values)]
            lost = sum(not math.isfinite(value) for value in values.values())
            chosen = "yes" if (act, rate) == study.choices()[arm] else ""
            rows.append([arm, code(act), f"{rate:g}", *means, str(lost), chosen])
    return rows


def _final_records(study: Study) -> list[tuple[Run, dict[str, Any]]]:
    runs = [Run(*trial, seed) for trial in study.final_trials() for seed in study.plan.final_seeds]
    return [(run, record) for run in runs if (record := study.record(run))]


def _facts(study: Study) -> list[list[str]]:
    plan, seconds = study.plan, study.seconds()
    records = [record for _, record in _final_records(study)]
    sessions = [session for record in records for session in record["sessions"]]

    flags = ", " * bool(plan.flags) + " ".join(code(f"{name}={value}") for name, value in plan.flags.items())

    def all_of(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    def dataset(config: Mapping[str, Any]) -> str:
        return code(config.get("dataset") or config.get("problem"))

    return [
        ["plan", f"`{plan.hash[:16]}`, frozen before the first run"],
        ["recipe", f"`{plan.recipe}`, preset `{plan.preset}`{flags}"],
        [
            "data",
            all_of(f"{dataset(r['config'])}, SHA-256 {code(r['data']['hash'][:16])}" for r in records),
        ],
        [
            "commit",
            all_of(text(s["commit"]) + ", with uncommitted changes" * bool(s["dirty"]) for s in sessions),
        ],
        ["versions", all_of(", ".join(text(f"{name} {v}") for name, v in s["versions"].items()) for s in sessions)],
        ["hardware", all_of(text(", ".join(s["hardware"]["gpus"]) or s["hardware"]["cpu"]) for s in sessions)],
        ["cost", f"{len(seconds)} runs, {sum(seconds) / 3600:.2f} hours in total"],
    ]


def _runs(study: Study) -> list[list[str]]:
    return [
        [
            run.name, record["status"], number(study.outcome(run)),
            f"{sum(session['seconds'] for session in record['sessions']):,.0f} s",
            code(record["init_hash"][:8]), code((record.get("order_hash") or "")[:8]),
        ]
        for run, record in _final_records(study)
    ]  # fmt: skip
