"""What the runs of a study are evaluated on, and how much of what is uncertain that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .plan import Run
from .study import Study
from .two_way import Components, components


@dataclass(frozen=True)
class Sample:
    """The samples over which the metric is a mean.

    Attributes:
        data: `validation` or `test`.
        size: Tokens whose loss is counted, or images.
        counted: What `size` counts: tokens or images.
        unit: What the samples are, such as documents; None where records have no parts of them.
        num_units: How many there are.
    """

    data: str
    size: int
    counted: str
    unit: str | None
    num_units: int


def sample_of(study: Study) -> Sample | None:
    """By the first record that says so; None where none does."""
    runs = [run for runs in study.final_runs().values() for run in runs]
    samples = (_sample(study.plan.metric, record) for run in runs if (record := study.record(run)))
    return next((sample for sample in samples if sample), None)


def _sample(metric: str, record: Mapping[str, Any]) -> Sample | None:
    data = metric.partition("_")[0]
    evaluation, counted = record.get("evaluation") or {}, record["result"].get("unit", "samples")
    if data in evaluation:
        parts = evaluation[data]
        return Sample(data, sum(parts["counts"]), counted, evaluation["unit"], parts["num_units"])
    size = record["data"].get(f"num_{counted}", {}).get(data)  # older records
    return Sample(data, size, counted, None, 0) if size else None


def tuning_components(study: Study) -> dict[str, Components]:
    """Arm -> the variance of its mean difference from the baseline at the tuning seeds, as far as these have run.

    Both at what is best so far; without arms of which fewer than two pairs with parts have finished.
    """
    plan = study.plan
    trials = {arm: study.trials(arm) for arm in plan.arms if plan.tunes}
    best = {arm: plan.best(means, key=means.__getitem__) for arm, means in trials.items() if means}
    parts = {
        arm: [study.parts(Run(act, rate, seed)) for seed in plan.tuning_seeds] for arm, (act, rate) in best.items()
    }
    found = {}
    for arm in parts if plan.baseline in parts else ():
        if arm == plan.baseline:
            continue
        pairs = [
            (ours, theirs)
            for ours, theirs in zip(parts[arm], parts[plan.baseline], strict=True)
            if ours is not None and theirs is not None
        ]
        if len(pairs) > 1 and np.count_nonzero(pairs[0][0][1]) > 1:
            found[arm] = components(np.array([ours[0] - theirs[0] for ours, theirs in pairs]), pairs[0][0][1])
    return found
