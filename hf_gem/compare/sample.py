"""The evaluation sample of a study, and the part of the uncertainty that comes from it."""

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
        data: The data, `validation` or `test`.
        size: Number of tokens whose loss is counted, or of images.
        counted: What `size` counts: tokens or images.
        unit: What a sample is, such as documents, or None if the records have no sums by sample.
        num_units: Number of samples.
    """

    data: str
    size: int
    counted: str
    unit: str | None
    num_units: int


def sample_of(study: Study) -> Sample | None:
    """Reads the evaluation sample from the first record that describes it; None if none does, or if samples differ."""
    runs = [run for runs in study.final_runs().values() for run in runs]
    samples = (_sample(study.plan.metric, record) for run in runs if (record := study.record(run)))
    return next((sample for sample in samples if sample), None) if study.same_samples(runs) else None


def _sample(metric: str, record: Mapping[str, Any]) -> Sample | None:
    data = metric.partition("_")[0]
    evaluation, counted = record.get("evaluation") or {}, record["result"].get("unit", "samples")
    if data in evaluation:
        parts = evaluation[data]
        return Sample(data, sum(parts["counts"]), counted, evaluation["unit"], parts["num_units"])
    size = record["data"].get(f"num_{counted}", {}).get(data)  # older records
    return Sample(data, size, counted, None, 0) if size else None


def tuning_components(study: Study) -> dict[str, Components]:
    """Computes arm -> the variance of its mean difference from the baseline, on the tuning seeds that have run.

    Arm and baseline are compared at their best trials so far. Arms with fewer than two finished pairs are left out.
    It is empty if the runs were evaluated on different samples.
    """
    plan = study.plan
    trials = {arm: study.trials(arm) for arm in plan.arms if plan.tunes}
    best = {arm: plan.best(means, key=means.__getitem__) for arm, means in trials.items() if means}
    runs = {arm: [Run(act, rate, seed) for seed in plan.tuning_seeds] for arm, (act, rate) in best.items()}
    if not study.same_samples(run for of_arm in runs.values() for run in of_arm):
        return {}
    parts = {arm: list(map(study.parts, of_arm)) for arm, of_arm in runs.items()}
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
