"""Summarises several studies of the same activations. The text is in `templates/summary.md.j2`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import markdown_code, markdown_text
from .drawing import metric_label
from .estimates import interquartile_mean
from .figures import SETTLED, Panel, Row, forests, unit_of
from .looks import SAME, look
from .pages import write_pages
from .plan import PlanError
from .stats import Comparison
from .study import Study
from .words import cell, render, span


@dataclass(frozen=True)
class Finding:
    """The result of an activation in one study.

    Attributes:
        comparison: Comparison with the common baseline.
        gains: Improvement at each seed that both finished, in multiples of the study's smallest effect of interest.
        interval: 95 % BCa interval of the mean gain.
        act: The activation that the study ran, which may be an approximation of the one in the summary.
    """

    comparison: Comparison
    gains: np.ndarray
    interval: tuple[float, float]
    act: str


@dataclass(frozen=True)
class Summary:
    """The results of an activation in all studies in which an arm chose it.

    Attributes:
        act: Name of the activation; with its learning rate if arms of one study chose it at different ones.
        findings: Study -> the result there.
        pooled: Interquartile mean of the gains over all seeds of all studies, and its 95 % interval by resampling seeds
            within each study. None if there is only one study, or if studies point in different directions: no study
            would have such a mean.
    """

    act: str
    findings: dict[str, Finding]
    pooled: tuple[float, float, float] | None


def summarise(studies: Sequence[Study], baseline: str) -> list[Summary]:
    """Compares each activation that an arm chose with one baseline, in every study that has both.

    Losses and accuracies become comparable as multiples of the smallest effect of interest, which each plan set before
    its study ran. A pair with a diverged run has no gain, but counts in the verdict.

    Args:
        studies: Studies with different names.
        baseline: An arm of every study.

    Raises:
        PlanError: A study lacks the arm, is not finished or not paired, or two studies have the same name.
    """
    names = [study.plan.name for study in studies]
    if len(set(names)) < len(names):
        raise PlanError(f"studies must have different names, got {', '.join(names)}. Name each study once.")
    found: dict[str, dict[str, Finding]] = {}
    chosen = [study.choices() for study in studies]
    apart = _apart(chosen)
    for study, choices in zip(studies, chosen, strict=True):
        plan = study.plan
        plan.require_arm(baseline)
        if problems := [*(run.name for run in study.missing()), *study.check_pairing()]:
            raise PlanError(f"{plan.name} is not finished, or not paired: {problems[0]}. See its report for details.")
        unit = plan.smallest_effect * (1 if plan.higher_is_better else -1)
        for c in study.comparisons(baseline):
            act, rate = choices[c.arm]
            name = act if _common(act) in apart else _common(act)
            if any(other == act and at != rate for other, at in choices.values()):
                name += f" learning_rate={rate:g}"
            low, high = sorted(end / unit for end in c.interval)
            # arms that chose the same activation share their runs
            gains = np.subtract(c.values, c.baseline) / unit
            found.setdefault(name, {})[plan.name] = Finding(c, gains, (low, high), act)
    return [Summary(act, findings, _pooled([f.gains for f in findings.values()])) for act, findings in found.items()]


def _common(act: str) -> str:
    """Returns the name in common of an activation and its approximations."""
    return SAME.get(act, act)


def _apart(chosen: Sequence[Mapping[str, tuple[str, float]]]) -> set[str]:
    """Returns the names in common of activations that a study compares with each other, from the studies' choices."""
    acts = [{act for act, _ in choices.values()} for choices in chosen]
    return {name for each in acts for name, count in Counter(map(_common, each)).items() if count > 1}


def _pooled(gains: Sequence[np.ndarray]) -> tuple[float, float, float] | None:
    if len(gains) < 2 or any(len(found) < 2 for found in gains):
        return None
    return interquartile_mean(gains) if len({found.mean() > 0 for found in gains}) == 1 else None


def write_summary(studies: Sequence[Study], baseline: str, folder: Path) -> Path:
    """Writes `summary.md`, `summary.html`, `summary.png` and `summary.svg`.

    Args:
        studies: Studies with different names.
        baseline: An arm of every study.
        folder: The output folder, which is created if needed.

    Returns:
        The path of the HTML page.
    """
    summaries = summarise(studies, baseline)
    folder.mkdir(parents=True, exist_ok=True)
    settings = [
        [study.plan.name, study.plan.metric, f"{study.plan.smallest_effect:g}", markdown_text(study.plan.notes)]
        for study in studies
    ]
    text = render(
        "summary.md.j2",
        studies=studies,
        baseline=baseline,
        gains=[row for summary in summaries for row in _rows(summary)],
        settings=settings,
        merged=any(s.act.split()[0] == "gelu" != f.act for s in summaries for f in s.findings.values()),
    )
    picture = forests([_panel(study, summaries, baseline) for study in studies])
    (folder / "summary.svg").write_bytes(picture.svg)
    return write_pages(folder, "summary", text, {"summary.png": picture})


def _rows(summary: Summary) -> Iterator[list[str]]:
    """Yields the rows of an activation in the table."""
    for name, f in summary.findings.items():
        c, middle = f.comparison, float(f.gains.mean()) if len(f.gains) else math.nan
        yield [
            markdown_code(summary.act), name, f"**{c.verdict}**", str(len(f.gains)), cell(middle, "+.3g"),
            span(f.interval), f"{c.diverged[0]} / {c.diverged[1]}",
        ]  # fmt: skip
    if summary.pooled:
        middle, low, high = summary.pooled
        pairs = sum(len(f.gains) for f in summary.findings.values())
        yield [markdown_code(summary.act), "all", "", str(pairs), f"{middle:+.3g}", span((low, high)), ""]


def _panel(study: Study, summaries: Sequence[Summary], baseline: str) -> Panel:
    """Returns the panel of a study in the picture: gains in the unit of its own metric."""
    plan, rows = study.plan, {}
    for summary in summaries:
        f = summary.findings.get(plan.name)
        if f and len(f.gains) > 1:
            gains, interval = (np.multiply(plan.smallest_effect, part) for part in (f.gains, f.interval))
            settled = f.comparison.verdict in SETTLED
            color = look(summary.act)["color"]
            name = f"{summary.act}: {f.comparison.verdict}"
            rows[name] = Row(gains.mean(), tuple(interval), color, points=gains.tolist(), settled=settled)
    label = f"gain over {baseline} in " + metric_label(plan.metric, unit_of(study, plan.metric, difference=True))
    return Panel(rows, plan.smallest_effect, label, plan.metric, higher_is_better=True, title=plan.name)
