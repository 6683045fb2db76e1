"""A preview of a study: its runs, the differences that it can find, and its cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .plan import Plan
from .power import minimum_detectable_effect
from .sample import tuning_components
from .stats import Comparison
from .study import PLAN, Study, check_frozen
from .two_way import Components
from .words import render


@dataclass(frozen=True)
class Detectable:
    """The smallest differences that a study is likely to find.

    Attributes:
        effect: The smallest difference, in standard deviations of paired differences; None if no difference can be
            found.
        seen: The same for each arm, in the unit of the metric, computed from the spread that was seen. It includes the
            spread over the evaluation sample if the records have it.
    """

    effect: float | None
    seen: list[float]


def detectable(plan: Plan, comparisons: Sequence[Comparison] = ()) -> Detectable:
    """Returns the smallest differences that the planned seeds are likely to find."""
    effect = minimum_detectable_effect(len(plan.final_seeds), len(plan.arms) - 1)
    if len(plan.final_seeds) < plan.min_seeds or math.isinf(effect):
        return Detectable(None, [])
    spreads = [_spread(c) for c in comparisons if len(c.seeds) > 1]
    return Detectable(effect, [float(effect * spread) for spread in spreads])


def _spread(c: Comparison) -> float:
    """Returns the standard deviation of paired differences that matches the standard error of their mean."""
    if c.components:
        return math.sqrt(len(c.seeds)) * c.components.estimate.error
    return float(np.subtract(c.values, c.baseline).std(ddof=1))


@dataclass(frozen=True)
class Expected:
    """What the tuning of an arm predicts for the final seeds.

    Attributes:
        seen: The variance of the mean difference from the baseline over the tuning seeds.
        planned: The same over the final seeds, with the same evaluation samples.
        effect: The true difference that is found with power 0.8; None if there is no such difference.
    """

    seen: Components
    planned: Components
    effect: float | None


def expected(study: Study) -> dict[str, Expected]:
    """Arm -> its prediction, for arms whose tuning runs recorded the parts of their outcomes."""
    seeds, effect = len(study.plan.final_seeds), detectable(study.plan).effect
    return {
        arm: Expected(
            seen,
            planned := seen.planned(seeds, seen.num_groups),
            effect and effect * math.sqrt(seeds) * planned.estimate.error,
        )
        for arm, seen in tuning_components(study).items()
    }


def preview(plan: Plan) -> str:
    """Describes what a plan runs, and which differences it can find."""
    tuning, final = plan.num_runs()
    return render("preview.txt.j2", plan=plan, tuning=tuning, final=final, detectable=detectable(plan))


def dry_run(plan: Plan, folder: Path, jobs: int) -> str:
    """Lists the runs that would start now, and predicts how long the study takes and how precise it will be.

    Args:
        plan: The plan of the study.
        folder: The folder of the study. It need not exist.
        jobs: Number of runs at once; see `Driver`.

    Raises:
        PlanError: the folder belongs to another plan.
    """
    missing, left, seconds = list(plan.tuning_runs()), sum(plan.num_runs()), list[float]()
    hardware: dict[str, Any] = {}
    arms: dict[str, Expected] = {}
    if (folder / PLAN).exists():
        check_frozen(plan, folder)
        study = Study(folder)
        missing, left, seconds = study.missing(), study.left(), study.seconds()
        hardware = study.hardware()
        arms = expected(study)
    each = sum(seconds) / max(1, len(seconds))
    hours = left * each / 3600 / max(1, jobs)
    return render(
        "dry_run.txt.j2",
        plan=plan,
        expected=arms,
        missing=missing,
        left=left,
        done=len(seconds),
        seconds=each,
        hours=hours,
        occupied=occupied(hours, jobs, hardware) if hardware else "",
    )


def occupied(hours: float, jobs: int, hardware: Mapping[str, Any]) -> str:
    """Returns the cost of a study: GPU-hours on a machine with GPUs, and core-hours on another.

    Args:
        hours: How long the study takes.
        jobs: Number of runs at once; see `Driver`.
        hardware: The hardware of a record.
    """
    if hardware["gpus"]:
        return f"{hours * min(max(1, jobs), len(hardware['gpus'])):.2g} GPU-hours"
    return f"{hours * max(1, jobs) * hardware['torch_threads']:.2g} core-hours"
