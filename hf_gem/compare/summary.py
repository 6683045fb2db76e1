"""What several studies say together of the activations that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .plan import PlanError
from .report import Part, Picture, Table, forest, span, write_pages
from .run import Study
from .stats import Comparison, interquartile_mean


@dataclass(frozen=True)
class Summary:
    """An activation over all studies in which an arm has chosen it.

    Attributes:
        act: Its name.
        comparisons: Study -> the comparison with the common baseline there.
        gains: The mean in each of them of what it is better by, in the study's smallest effect of interest.
        gain: Interquartile mean of the same over the seeds of all.
        interval: 95 % interval of that, by drawing seeds anew within each study.
    """

    act: str
    comparisons: dict[str, Comparison]
    gains: list[float]
    gain: float
    interval: tuple[float, float]


def summarise(studies: Sequence[Study], baseline: str) -> list[Summary]:
    """Compares every activation that an arm has chosen with one baseline, in every study that has both.

    Differences of losses and of accuracies become comparable as multiples of the smallest effect of interest that each
    plan has named before its study ran. Every study counts by its number of seeds; pairs of which one diverged do not.

    Args:
        studies: With different names.
        baseline: An arm of each.

    Raises:
        PlanError: a study has no such arm, is not finished or not paired, or two have one name.
    """
    names = [study.plan.name for study in studies]
    if len(set(names)) < len(names):
        raise PlanError(f"studies must differ in name, got {', '.join(names)}")
    found: dict[str, dict[str, tuple[Comparison, np.ndarray]]] = {}
    for study in studies:
        plan = study.plan
        plan.require_arm(baseline)
        if problems := [*(run.name for run in study.missing()), *study.check_pairing()]:
            raise PlanError(f"{plan.name} is not finished, or not paired: {problems[0]}; its report says more")
        choices = study.choices()
        for c in study.comparisons(baseline):
            if len(c.seeds) > 1:
                better = np.subtract(c.values, c.baseline) * (1 if plan.higher_is_better else -1)
                # arms that have chosen the same activation are the same runs
                found.setdefault(choices[c.arm][0], {})[plan.name] = c, better / plan.smallest_effect
    summaries = []
    for act, parts in found.items():
        comparisons, gains = {name: c for name, (c, _) in parts.items()}, [gain for _, gain in parts.values()]
        middle, low, high = interquartile_mean(gains)
        summaries.append(Summary(act, comparisons, [float(gain.mean()) for gain in gains], middle, (low, high)))
    return summaries


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
    rows = [
        [
            f"`{s.act}`", str(sum(len(c.seeds) for c in s.comparisons.values())), f"{s.gain:+.3g}", span(s.interval),
            ", ".join(f"{name}: {gain:+.3g}, {c.verdict}" + (f", {c.diverged[0]} diverged" if c.diverged[0] else "")
                      for (name, c), gain in zip(s.comparisons.items(), s.gains, strict=True)),
        ]
        for s in summaries
    ]  # fmt: skip
    settings = [
        [study.plan.name, study.plan.metric, f"{study.plan.smallest_effect:g}", study.plan.notes] for study in studies
    ]
    parts: list[Part] = [
        f"# Against {baseline}, in {', '.join(study.plan.name for study in studies)}",
        "Gains are multiples of each study's smallest effect of interest; above 0 is better than the baseline, and "
        "below 1 of no interest. The first is the interquartile mean over the seeds of all studies that have the "
        "activation: a study whose seeds all lie in the outer quarters moves it by their ranks alone, so the mean gain "
        "of each stands beside it. The interval draws seeds anew within each study; it says nothing of tasks that are "
        f"not here. Verdicts are against `{baseline}`, also where a plan has named another baseline.",
        Table(["activation", "pairs", "gain", "95 %", "in each study"], rows),
        Picture(
            "summary.png",
            f"Gain over {baseline}, 95 % intervals; points: mean of each study; grey: of no interest",
            forest(
                {s.act: (s.gain, s.interval, s.gains) for s in summaries}, 1, "gain, in smallest effects of interest"
            ),
        ),
        Table(["study", "metric", "smallest effect of interest", "notes"], settings),
    ]
    return write_pages(folder, "summary", parts)
