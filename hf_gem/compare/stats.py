"""Compares the arms of a study with the baseline, from the outcomes of each seed.

Arms with the same seed share initial weights, data order and all other randomness, so their outcomes are compared seed
by seed. The unpaired comparison is reported too, since pairing only helps if the outcomes are correlated. Differences
are arm minus baseline, in the unit of the metric.

All runs are evaluated on the same documents or images. The sign-flip test over seeds asks whether an arm is better on
these documents. If the outcomes of each document are known, a two-way test asks whether it is better on all such
documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..files import shown
from .estimates import ALPHA, bca_interval, holm, over_seeds, scipy_stats, sign_flip_p
from .power import further_seeds
from .two_way import Components, components

Parts = Mapping[str, Mapping[int, np.ndarray]]
Verdict = Literal["better", "worse", "equivalent", "inconclusive", "pending"]


@dataclass(frozen=True)
class Comparison:
    """The comparison of an arm with the baseline. With fewer than two finished pairs, most numbers are NaN.

    Attributes:
        arm: Name of the arm.
        seeds: Seeds at which both runs finished.
        values: Outcomes of the arm at these seeds.
        baseline: Outcomes of the baseline at these seeds.
        pairs: Number of seeds at which both runs ended, diverged or not.
        diverged: Number of runs of the arm, and of the baseline, that did not end with a finite outcome.
        p: Two-sided p of the exact sign-flip test. A diverged run counts as worse than any other.
        p_two_way: p of the hypothesis that the difference is zero over all possible seeds and evaluation samples, by
            Student's t with the variance of `components`. NaN if the records have no outcomes by group.
        p_holm: The larger of the two, adjusted by Holm for the number of arms.
        verdict: The verdict; see `verdict`. It is "pending" while runs are missing.
        further_seeds: Number of seeds that would settle an inconclusive comparison, if the observed effect is the true
            one. None if it is settled, or if no number is enough.
        barred: Whether the one with the better mean diverged more often. More seeds cannot settle that.
        difference: Mean of the differences.
        interval: 95 % interval of the mean difference. With `components`, it holds the means that the two-way test does
            not reject; otherwise it is a BCa bootstrap over seeds.
        adjusted_interval: Interval by Student's t. Those of all arms cover jointly with 95 % (Bonferroni).
        t_interval: 95 % interval over seeds by Student's t, which is exact for normal differences.
        components: Components of the variance of the difference, or None if the records have no outcomes by group.
        d_z: Mean of the differences divided by their standard deviation.
        correlation: Correlation over seeds between the outcomes of arm and baseline.
        superiority: Share of seeds at which the arm is better. A tie counts half.
        p_equivalence: The larger p of the two one-sided t tests against the smallest effect of interest. Their standard
            error comes from `components`, if there are any.
        p_equivalence_holm: `p_equivalence`, adjusted by Holm for the number of arms; 1 with too few finished pairs.
        welch_interval: 95 % interval of the difference of means without pairing, by Welch's test.
        welch_p: p of Welch's test.
    """

    arm: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    baseline: tuple[float, ...]
    pairs: int
    diverged: tuple[int, int]
    p: float
    p_two_way: float
    p_holm: float
    p_equivalence_holm: float
    verdict: Verdict
    further_seeds: int | None = None
    barred: bool = False
    difference: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    adjusted_interval: tuple[float, float] = (math.nan, math.nan)
    t_interval: tuple[float, float] = (math.nan, math.nan)
    d_z: float = math.nan
    correlation: float = math.nan
    superiority: float = math.nan
    p_equivalence: float = math.nan
    welch_interval: tuple[float, float] = (math.nan, math.nan)
    welch_p: float = math.nan
    components: Components | None = None


@dataclass(frozen=True)
class _Pairs:
    """The runs of an arm and of the baseline at the seeds where both have ended.

    Attributes:
        seeds: The seeds.
        outcomes: Outcomes of both, (seeds, 2).
        gains: How much the arm is better at each seed; see `_gains`.
        by_group: Differences of finished runs, summed over each group of evaluation samples, (seeds, groups), and the
            number of summands, (groups,). None if the records have no outcomes by group.
    """

    seeds: list[int]
    outcomes: np.ndarray
    gains: np.ndarray
    by_group: tuple[np.ndarray, np.ndarray] | None

    @property
    def finished(self) -> np.ndarray:
        """A mask of the seeds at which both have finished."""
        found: np.ndarray = np.isfinite(self.outcomes).all(1)
        return found

    @property
    def differences(self) -> np.ndarray:
        """Differences of finished runs, arm minus baseline."""
        found: np.ndarray = self.outcomes[self.finished] @ (1, -1)
        return found

    def values(self) -> dict[str, Any]:
        """Returns seeds and outcomes of finished runs, as fields of `Comparison`."""
        values, base = self.outcomes[self.finished].T.tolist()
        seeds = np.array(self.seeds, dtype=int)[self.finished].tolist()
        return {"seeds": tuple(seeds), "values": tuple(values), "baseline": tuple(base)}

    def two_way_p(self, sign: int) -> float:
        """Computes p of the hypothesis that the arm is neither better nor worse over all seeds and evaluation samples.

        A diverged run is equally worse on all samples, by the same amount as in the sign-flip test.
        """
        if self.by_group is None:
            return math.nan
        differences, counts = self.by_group
        gains = np.outer(self.gains, counts)
        gains[self.finished] = sign * differences
        return components(gains, counts).estimate.p()


def compare(
    outcomes: Mapping[str, Mapping[int, float]],
    baseline: str,
    smallest_effect: float,
    higher_is_better: bool,
    min_seeds: int,
    parts: Parts | None = None,
) -> list[Comparison]:
    """Compares every arm with the baseline.

    Args:
        outcomes: Arm -> seed -> outcome, which is NaN or infinite if the run diverged.
        baseline: The arm that the others are compared with.
        smallest_effect: Smallest effect of interest, in the unit of the metric.
        higher_is_better: Whether a higher metric is better.
        min_seeds: Smallest number of pairs for a verdict. A pair with a diverged run counts, but not for "equivalent".
        parts: Arm -> seed -> sums and counts of each group of evaluation samples, (2, groups), so that the outcome is
            sums.sum() / counts.sum(). An arm's interval only counts samples if all finished runs have them.

    Raises:
        ValueError: The baseline is not an arm, or parts do not match the outcomes or come from different samples.
    """
    if baseline not in outcomes:
        raise ValueError(f"the baseline must be one of the arms {', '.join(outcomes)}, got {shown(baseline)}")
    sign = 1 if higher_is_better else -1
    pairs = {arm: _pairs_of(arm, baseline, outcomes, parts or {}, sign) for arm in outcomes if arm != baseline}
    p = {arm: (sign_flip_p(found.gains), found.two_way_p(sign)) for arm, found in pairs.items()}
    p_holm = _holm({arm: float(np.fmax(*both)) for arm, both in p.items()})
    numbers = {arm: _numbers(found, sign, smallest_effect, len(pairs)) for arm, found in pairs.items()}
    # Only finished pairs count, and there must be enough of them: two that agree do not show equivalence.
    equivalence = _holm({arm: numbers[arm].get("p_equivalence", 1.0) if found.finished.sum() >= min_seeds else 1.0
                         for arm, found in pairs.items()})  # fmt: skip
    compared = []
    for arm, found in pairs.items():
        diverged = _diverged(outcomes[arm]), _diverged(outcomes[baseline])
        enough = len(found.seeds) >= min_seeds
        word = verdict(found.gains, p_holm[arm], equivalence[arm], enough=enough, diverged=diverged)
        barred = word == "inconclusive" and float(np.sign(found.gains.sum())) * (diverged[0] - diverged[1]) > 0
        more = None
        if numbers[arm] and word == "inconclusive" and not barred:
            parted, settled = numbers[arm]["components"], (smallest_effect, min_seeds, len(pairs))
            more = further_seeds(found.differences, *settled, parted.groups if parted else 0.0)
        compared.append(
            Comparison(
                arm=arm,
                pairs=len(found.seeds),
                diverged=diverged,
                p=p[arm][0],
                p_two_way=p[arm][1],
                p_holm=p_holm[arm],
                p_equivalence_holm=equivalence[arm],
                verdict=word,
                further_seeds=more,
                barred=barred,
                **found.values(),
                **numbers[arm],
            )
        )
    return compared


def _holm(p: Mapping[str, float]) -> dict[str, float]:
    return dict(zip(p, holm(list(p.values())), strict=True))


def _pairs_of(arm: str, baseline: str, outcomes: Mapping[str, Mapping[int, float]], parts: Parts, sign: int) -> _Pairs:
    seeds = sorted(outcomes[arm].keys() & outcomes[baseline].keys())
    values = np.array([(outcomes[arm][seed], outcomes[baseline][seed]) for seed in seeds]).reshape(-1, 2)
    finished = [seed for seed, row in zip(seeds, values, strict=True) if np.isfinite(row).all()]
    by_group = None
    if len(seeds) > 1 and finished and all(parts.get(n, {}).keys() >= set(finished) for n in (arm, baseline)):
        sums, counts = zip(*(_sums_of(name, outcomes, parts, finished) for name in (arm, baseline)), strict=True)
        if not np.array_equal(*counts):
            raise ValueError(
                f"{arm} and {baseline} were evaluated on different samples: their counts by group differ. Rerun one."
            )
        if np.count_nonzero(counts[0]) > 1:
            by_group = sums[0] - sums[1], counts[0]
    return _Pairs(seeds, values, _gains(sign * values), by_group)


def _sums_of(
    arm: str, outcomes: Mapping[str, Mapping[int, float]], parts: Parts, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sums by seed and group, (seeds, groups), and counts by group, (groups,).

    Raises:
        ValueError: Outcomes are not sums divided by counts, or counts differ between seeds.
    """
    first = parts[arm][seeds[0]][1]
    for seed in seeds:
        sums, counts = parts[arm][seed]
        if not np.array_equal(counts, first):
            raise ValueError(
                f"the seeds {seeds[0]} and {seed} of {arm} were evaluated on different samples. Rerun one of them."
            )
        made, outcome = sums.sum() / counts.sum(), outcomes[arm][seed]
        if not math.isclose(made, outcome, rel_tol=1e-5):  # losses are summed in float32 and in a different order
            raise ValueError(
                f"the groups of {arm}, seed {seed}, give {made:.6g}, but its outcome is {outcome:.6g}. Rerun it."
            )
    return np.array([parts[arm][seed][0] for seed in seeds]), first


def _gains(pairs: np.ndarray) -> np.ndarray:
    """Computes how much an arm is better at each seed. A diverged run is worse by the largest finished difference.

    If arm and baseline are equivalent, both signs of each gain are equally likely, whatever its size. The sign-flip
    test requires nothing else.
    """
    finished = np.isfinite(pairs)
    both = finished.all(1)
    found = np.zeros(len(pairs))
    found[both] = pairs[both, 0] - pairs[both, 1]
    largest = np.abs(found).max(initial=0) or 1.0
    found[~both] = largest * (finished[~both, 0].astype(float) - finished[~both, 1])
    return found


def _numbers(pairs: _Pairs, sign: int, smallest_effect: float, arms: int) -> dict[str, Any]:
    """Computes the fields of `Comparison` that need finished pairs; empty with fewer than two."""
    values, base = pairs.outcomes[pairs.finished].T
    if len(values) < 2:
        return {}
    differences = pairs.differences
    seeds, parted = over_seeds(differences), components(*pairs.by_group) if pairs.by_group else None
    best = parted.estimate if parted else seeds
    interval = best.interval() if parted else bca_interval(differences)
    welch = scipy_stats().ttest_ind(values, base, equal_var=False)
    welch_interval = welch.confidence_interval(1 - ALPHA)
    varies = values.std() > 0 and base.std() > 0
    return {
        "difference": float(differences.mean()),
        "interval": interval,
        "adjusted_interval": best.interval(ALPHA / arms) if arms > 1 else interval,
        "t_interval": seeds.interval(),
        "components": parted,
        "d_z": _standardised(differences),
        "correlation": float(np.corrcoef(values, base)[0, 1]) if varies else math.nan,
        "superiority": float(np.mean((sign * differences > 0) + 0.5 * (differences == 0))),
        "p_equivalence": best.p_equivalence(smallest_effect),
        "welch_interval": (float(welch_interval.low), float(welch_interval.high)),
        "welch_p": float(welch.pvalue),
    }


def _standardised(differences: np.ndarray) -> float:
    mean, spread = float(differences.mean()), float(differences.std(ddof=1))
    return mean / spread if spread > 0 else math.copysign(math.inf, mean) if mean else 0.0


def _diverged(outcomes: Mapping[int, float]) -> int:
    return sum(not math.isfinite(value) for value in outcomes.values())


def verdict(gains: np.ndarray, p: float, p_equivalence: float, enough: bool, diverged: tuple[int, int]) -> Verdict:
    """Returns the verdict on an arm in one word.

    It is "equivalent" if both one-sided tests put the difference inside the smallest effect of interest, even if the
    difference is certainly not zero. Otherwise it is "better" or "worse" if the sign-flip test rejects, and also the
    two-way test if there is one. The one that diverged more often is never the better one. In all other cases, and with
    too few seeds, it is "inconclusive".

    Args:
        gains: Differences, positive if the arm is better.
        p: p of the difference, adjusted for the number of arms.
        p_equivalence: p of equivalence, adjusted for the number of arms.
        enough: Whether there are enough seeds for a verdict.
        diverged: Number of diverged runs of the arm and of the baseline.
    """
    if not enough:
        return "inconclusive"
    if p_equivalence < ALPHA and diverged[0] == diverged[1]:
        return "equivalent"
    if p < ALPHA and gains.sum() > 0 and diverged[0] <= diverged[1]:
        return "better"
    if p < ALPHA and gains.sum() < 0 and diverged[0] >= diverged[1]:
        return "worse"
    return "inconclusive"
