"""What a study will do, find and cost, before it runs."""

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
from .study import PLAN, Study, freeze
from .two_way import Components
from .words import render


@dataclass(frozen=True)
class Detectable:
    """What differences a study can find.

    Attributes:
        effect: In standard deviations of the differences of a pair; None where there is no such difference.
        seen: For each arm, the same in the unit of the metric, by the spread that was seen; with the evaluation sample,
            where the records have parts of it.
    """

    effect: float | None
    seen: list[float]


def detectable(plan: Plan, comparisons: Sequence[Comparison] = ()) -> Detectable:
    """What differences the planned seeds can find."""
    effect = minimum_detectable_effect(len(plan.final_seeds), len(plan.arms) - 1)
    if len(plan.final_seeds) < plan.min_seeds or math.isinf(effect):
        return Detectable(None, [])
    spreads = [_spread(c) for c in comparisons if len(c.seeds) > 1]
    return Detectable(effect, [float(effect * spread) for spread in spreads])


def _spread(c: Comparison) -> float:
    """Standard deviation of paired differences that would give their mean the standard error that it has."""
    if c.components:
        return math.sqrt(len(c.seeds)) * c.components.estimate.error
    return float(np.subtract(c.values, c.baseline).std(ddof=1))


@dataclass(frozen=True)
class Expected:
    """What the final seeds are expected to say of an arm, by its tuning.

    Attributes:
        seen: Variance of the mean difference from the baseline over the tuning seeds.
        planned: The same over the final seeds, with the same samples.
        effect: The true difference that is found with power 0.8; None where there is none.
    """

    seen: Components
    planned: Components
    effect: float | None


def expected(study: Study) -> dict[str, Expected]:
    """Arm -> what is expected, of those with tuning runs whose records have the parts of their outcomes."""
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
    """What a plan runs, and which differences that can find."""
    tuning, final = plan.num_runs()
    return render("preview.txt.j2", plan=plan, tuning=tuning, final=final, detectable=detectable(plan))


def dry_run(plan: Plan, folder: Path, jobs: int) -> str:
    """The runs that would be started now, how long what is planned takes, and how exact it is expected to be.

    Args:
        plan: Of the study.
        folder: Of the study; it need not be there.
        jobs: Runs at once; see `Driver`.

    Raises:
        PlanError: the folder is that of another plan.
    """
    missing, left, seconds = list(plan.tuning_runs()), sum(plan.num_runs()), list[float]()
    hardware: dict[str, Any] = {}
    arms: dict[str, Expected] = {}
    if (folder / PLAN).exists():
        freeze(plan, folder)  # which refuses another plan
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
    """What a study of some hours takes of a machine: GPU-hours where it has GPUs, and otherwise core-hours.

    Args:
        hours: Of the study.
        jobs: Runs at once; see `Driver`.
        hardware: Of a record.
    """
    if hardware["gpus"]:
        return f"{hours * min(max(1, jobs), len(hardware['gpus'])):.2g} GPU-hours"
    return f"{hours * max(1, jobs) * hardware['torch_threads']:.2g} core-hours"
