"""What several studies say together of the activations that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .plan import PlanError
from .report import Part, Picture, Table, cell, forest, span, write_pages
from .stats import Comparison, interquartile_mean
from .study import Study

# Approximations that differ from what they stand for by less than 0.0005, and other names.
_SAME = {"gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_fast": "gelu", "gelu_python": "gelu", "swish": "silu"}


@dataclass(frozen=True)
class Finding:
    """An activation in one study.

    Attributes:
        comparison: With the common baseline.
        gains: What it is better by at each seed that both finished, in the study's smallest effect of interest.
        interval: 95 % BCa interval of their mean.
    """

    comparison: Comparison
    gains: np.ndarray
    interval: tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """An activation over all studies in which an arm has chosen it.

    Attributes:
        act: Its name.
        findings: Study -> what came out there.
        pooled: Interquartile mean of the gains at all seeds of all studies, and its 95 % interval by drawing seeds anew
            within each study; None where there is one study, or where studies point in different directions: that
            mean would be one that none of them has.
    """

    act: str
    findings: dict[str, Finding]
    pooled: tuple[float, float, float] | None


def summarise(studies: Sequence[Study], baseline: str) -> list[Summary]:
    """Compares every activation that an arm has chosen with one baseline, in every study that has both.

    Differences of losses and of accuracies become comparable as multiples of the smallest effect of interest that each
    plan has named before its study ran. Pairs of which one diverged have no gain, and count in the verdict.

    Args:
        studies: With different names.
        baseline: An arm of each.

    Raises:
        PlanError: a study has no such arm, is not finished or not paired, or two have one name.
    """
    names = [study.plan.name for study in studies]
    if len(set(names)) < len(names):
        raise PlanError(f"studies must differ in name, got {', '.join(names)}")
    found: dict[str, dict[str, Finding]] = {}
    for study in studies:
        plan = study.plan
        plan.require_arm(baseline)
        if problems := [*(run.name for run in study.missing()), *study.check_pairing()]:
            raise PlanError(f"{plan.name} is not finished, or not paired: {problems[0]}; its report says more")
        choices, unit = study.choices(), plan.smallest_effect * (1 if plan.higher_is_better else -1)
        for c in study.comparisons(baseline):
            act = choices[c.arm][0]
            low, high = sorted(end / unit for end in c.interval)
            # arms that have chosen the same activation are the same runs
            found.setdefault(_SAME.get(act, act), {})[plan.name] = Finding(
                c, np.subtract(c.values, c.baseline) / unit, (low, high)
            )
    return [Summary(act, findings, _pooled([f.gains for f in findings.values()])) for act, findings in found.items()]


def _pooled(gains: Sequence[np.ndarray]) -> tuple[float, float, float] | None:
    if len(gains) < 2 or any(len(found) < 2 for found in gains):
        return None
    return interquartile_mean(gains) if len({found.mean() > 0 for found in gains}) == 1 else None


def write_summary(studies: Sequence[Study], baseline: str, folder: Path) -> Path:
    """Writes `summary.md`, `summary.html` and `summary.png`.

    Args:
        studies: As in `summarise`.
        baseline: Likewise.
        folder: Where to; it is made.

    Returns:
        The HTML page.
    """
    summaries = summarise(studies, baseline)
    folder.mkdir(parents=True, exist_ok=True)
    rows, intervals = [], {}
    for s in summaries:
        for name, f in s.findings.items():
            c, middle = f.comparison, float(f.gains.mean()) if len(f.gains) else math.nan
            rows.append(
                [
                    f"`{s.act}`", name, str(len(f.gains)), cell(middle, "+.3g"), span(f.interval),
                    f"{c.diverged[0]} / {c.diverged[1]}", f"**{c.verdict}**",
                ]
            )  # fmt: skip
            if len(f.gains) > 1:
                intervals[f"{s.act}: {name}"] = middle, f.interval, f.gains.tolist()
        if s.pooled:
            middle, low, high = s.pooled
            pairs = sum(len(f.gains) for f in s.findings.values())
            rows.append([f"`{s.act}`", "all", str(pairs), f"{middle:+.3g}", span((low, high)), "", ""])
            intervals[f"{s.act}: all"] = middle, (low, high), []
    mixed = [f"**Mixed:** {study.plan.name}: {'; '.join(found)}." for study in studies if (found := study.mixtures())]
    settings = [
        [study.plan.name, study.plan.metric, f"{study.plan.smallest_effect:g}", study.plan.notes] for study in studies
    ]
    parts: list[Part] = [
        f"# Against {baseline}, in {', '.join(study.plan.name for study in studies)}",
        "Gains are multiples of each study's smallest effect of interest; above 0 is better than the baseline, and "
        "below 1 of no interest. Verdicts and 95 % intervals are those of each study, against "
        f"`{baseline}` also where its plan has named another baseline; diverged are runs of the activation / of the "
        "baseline. Where an activation has several studies that point in one "
        "direction, a row for all of them has the interquartile mean over their seeds; its interval draws seeds anew "
        "within each, and says nothing of tasks that are not here. `gelu` stands for its approximation by tanh, too.",
        *mixed,
        Table(["activation", "study", "pairs", "gain", "95 %", "diverged", "verdict"], rows),
        Picture(
            "summary.png",
            f"Gain over {baseline}, 95 % intervals; points: seeds; grey: of no interest",
            forest(intervals, 1, "gain, in smallest effects of interest"),
        ),
        Table(["study", "metric", "smallest effect of interest", "notes"], settings),
    ]
    return write_pages(folder, "summary", parts)
