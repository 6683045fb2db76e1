"""What several studies say together of the activations that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .plan import PlanError
from .report import Part, Picture, Table, new_figure, png_of, span, write_pages
from .run import Study
from .stats import Comparison, compare, interquartile_mean


@dataclass(frozen=True)
class Summary:
    """An arm over all studies that have it.

    Attributes:
        arm: Its name.
        comparisons: Study -> the comparison with the common baseline there.
        gain: Interquartile mean, over seeds of all studies, of what it is better by, in each study's smallest effect of
            interest.
        interval: 95 % interval of that, by drawing seeds anew within each study.
    """

    arm: str
    comparisons: dict[str, Comparison]
    gain: float
    interval: tuple[float, float]


def summarise(studies: Sequence[Study], baseline: str) -> list[Summary]:
    """Compares every arm with one baseline, in every study that has both.

    Differences of losses and of accuracies become comparable as multiples of the smallest effect of interest that each
    plan has named before its study ran. Every study counts by its number of seeds.

    Args:
        studies: With different names.
        baseline: An arm of each.

    Raises:
        PlanError: a study has no such arm, or two have one name.
    """
    names = [study.plan.name for study in studies]
    if len(set(names)) < len(names):
        raise PlanError(f"studies must differ in name, got {', '.join(names)}")
    found: dict[str, dict[str, Comparison]] = {}
    gains: dict[str, list[np.ndarray]] = {}
    for study in studies:
        plan = study.plan
        if baseline not in plan.arms:
            raise PlanError(f"{plan.name} has no arm {baseline!r}; its arms are {', '.join(plan.arms)}")
        for c in compare(study.outcomes(), baseline, plan.smallest_effect, plan.higher_is_better, plan.min_seeds):
            better = np.subtract(c.values, c.baseline) * (1 if plan.higher_is_better else -1)
            found.setdefault(c.arm, {})[plan.name] = c
            gains.setdefault(c.arm, []).append(better / plan.smallest_effect)
    return [
        Summary(arm, comparisons, middle, (low, high))
        for arm, comparisons in found.items()
        for middle, low, high in [interquartile_mean(gains[arm])]
    ]


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
            f"`{s.arm}`", str(sum(len(c.seeds) for c in s.comparisons.values())), f"{s.gain:+.3g}", span(s.interval),
            ", ".join(f"{name}: {c.verdict}" for name, c in s.comparisons.items()),
        ]
        for s in summaries
    ]  # fmt: skip
    settings = [
        [study.plan.name, study.plan.metric, f"{study.plan.smallest_effect:g}", study.plan.notes] for study in studies
    ]
    parts: list[Part] = [
        f"# Against {baseline}, in {', '.join(study.plan.name for study in studies)}",
        "Gains are interquartile means over the seeds of all studies that have an arm, in multiples of each study's "
        "smallest effect of interest; above 0 is better than the baseline, and below 1 of no interest. The interval "
        "draws seeds anew within each study; it says nothing of tasks that are not here. Verdicts are each study's, "
        f"with `{baseline}` for a baseline.",
        Table(["arm", "pairs", "gain", "95 %", "verdicts"], rows),
        Picture("summary.png", f"Gain over {baseline}, 95 % intervals; grey: of no interest", _forest(summaries)),
        Table(["study", "metric", "smallest effect of interest", "notes"], settings),
    ]
    return write_pages(folder, "summary", parts)


def _forest(summaries: Sequence[Summary]) -> bytes:
    figure, axes = new_figure(7, 1.2 + 0.5 * len(summaries))
    axes.axvspan(-1, 1, color="0.9")
    axes.axvline(0, color="0.5", lw=0.8)
    for row, summary in enumerate(summaries):
        axes.plot(summary.interval, (row, row), color="C0", lw=2)
        axes.plot(summary.gain, row, "o", color="C0")
    axes.set_yticks(range(len(summaries)), [s.arm for s in summaries])
    axes.set_ylim(-0.6, len(summaries) - 0.4)
    axes.invert_yaxis()
    axes.set_xlabel("gain, in smallest effects of interest")
    return png_of(figure)
