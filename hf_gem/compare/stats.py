"""What a study says of an arm against its baseline, from the outcomes of each seed.

Arms of a seed share initial weights, data order and all other randomness, so their outcomes are compared seed by seed.
The unpaired comparison stands beside it, since pairing helps only as far as the outcomes are correlated. Differences
are arm minus baseline, in the unit of the metric.

All runs are evaluated on the same documents or images. The sign-flip test over seeds asks whether an arm is better on
these; with the parts of the outcomes that each of them has, a two-way test asks the same of all such documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .estimates import ALPHA, bca_interval, holm, over_seeds, scipy_stats, sign_flip_p
from .power import further_seeds
from .two_way import Components, components

Parts = Mapping[str, Mapping[int, np.ndarray]]
Verdict = Literal["better", "worse", "equivalent", "inconclusive", "pending"]


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline. Where fewer than two seeds finished at both, most numbers are NaN.

    Attributes:
        arm: Its name.
        seeds: Those at which both finished.
        values: Outcomes of the arm at them.
        baseline: Outcomes of the baseline at them.
        pairs: Seeds at which both have ended, diverged or not.
        diverged: Runs of the arm, and of the baseline, that did not finish with a finite outcome.
        p: Of the exact sign-flip test, two-sided; a run that diverged counts as worse than any that did not.
        p_two_way: That the difference is zero for all seeds and all evaluation samples there could be, of Student's t
            with the variance of `components`; NaN where the records have no parts.
        p_holm: The larger of the two, adjusted by Holm for the number of arms.
        verdict: See `verdict`; pending, as long as runs are missing.
        further_seeds: How many more would settle an inconclusive comparison, if what was seen is the truth; None where
            it is settled, or no number is enough.
        barred: Whether the one with the better mean of the two diverged more often, which no number of seeds undoes.
        difference: Mean of the differences.
        interval: 95 % interval of that: with `components` the means that the two-way test does not reject; without,
            over seeds alone by the BCa bootstrap.
        adjusted_interval: The intervals of all arms cover together in 95 % (Bonferroni); by Student's t.
        t_interval: 95 % interval over seeds alone by Student's t, which is exact for normal differences.
        components: What the variance of the difference is made of; None where the records have no parts.
        d_z: Mean over standard deviation of the differences.
        correlation: Of the outcomes of the two, over seeds.
        superiority: Share of seeds at which the arm is better; a tie is half.
        p_equivalence: The larger p of the two one-sided t tests against the smallest effect of interest; their standard
            error is that of `components` where there are any.
        p_equivalence_holm: The same, adjusted by Holm for the number of arms; 1 with too few pairs that finished.
        welch_interval: 95 % interval of the difference of means without pairing.
        welch_p: Its p.
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
        seeds: These.
        outcomes: Of both, (seeds, 2).
        gains: What the arm is better by at each; see `_gains`.
        by_group: Differences of finished runs, summed in each group of evaluation samples, (seeds, groups), and what
            these sums are over, (groups,); None where records have no parts.
    """

    seeds: list[int]
    outcomes: np.ndarray
    gains: np.ndarray
    by_group: tuple[np.ndarray, np.ndarray] | None

    @property
    def finished(self) -> np.ndarray:
        """At which seeds both have finished."""
        found: np.ndarray = np.isfinite(self.outcomes).all(1)
        return found

    @property
    def differences(self) -> np.ndarray:
        """Of finished runs, arm minus baseline."""
        found: np.ndarray = self.outcomes[self.finished] @ (1, -1)
        return found

    def values(self) -> dict[str, Any]:
        """Seeds and outcomes of finished runs, as a `Comparison` has them."""
        values, base = self.outcomes[self.finished].T.tolist()
        seeds = np.array(self.seeds, dtype=int)[self.finished].tolist()
        return {"seeds": tuple(seeds), "values": tuple(values), "baseline": tuple(base)}

    def two_way_p(self, sign: int) -> float:
        """That the arm is no better and no worse, for all seeds and evaluation samples.

        A run that diverged is worse in all samples alike, by what the sign-flip test takes.
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
        outcomes: Arm -> seed -> outcome; NaN or infinite where the run diverged.
        baseline: The arm that the others are compared with.
        smallest_effect: Differences smaller than this are of no interest, in the unit of the metric.
        higher_is_better: Whether the metric is to be large.
        min_seeds: With fewer pairs than this, no arm is called better or worse.
        parts: Arm -> seed -> sums and counts of each group of evaluation samples, (2, groups), with outcome =
            sums.sum() / counts.sum(); needed of all finished runs for an arm's interval to count them.

    Raises:
        ValueError: the baseline is no arm, or parts are not those of the outcomes or not of the same samples.
    """
    if baseline not in outcomes:
        raise ValueError(f"baseline {baseline!r} is no arm; the arms are {', '.join(outcomes)}")
    sign = 1 if higher_is_better else -1
    pairs = {arm: _pairs_of(arm, baseline, outcomes, parts or {}, sign) for arm in outcomes if arm != baseline}
    p = {arm: (sign_flip_p(found.gains), found.two_way_p(sign)) for arm, found in pairs.items()}
    p_holm = _holm({arm: float(np.fmax(*both)) for arm, both in p.items()})
    numbers = {arm: _numbers(found, sign, smallest_effect, len(pairs)) for arm, found in pairs.items()}
    # Of finished pairs alone, of which there have to be enough: two that agree are no ground for "equivalent".
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
            raise ValueError(f"{arm} and {baseline} were evaluated on different samples: their counts by group differ")
        if np.count_nonzero(counts[0]) > 1:
            by_group = sums[0] - sums[1], counts[0]
    return _Pairs(seeds, values, _gains(sign * values), by_group)


def _sums_of(
    arm: str, outcomes: Mapping[str, Mapping[int, float]], parts: Parts, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums by seed and group, (seeds, groups), and counts by group, (groups,).

    Raises:
        ValueError: outcomes are not sums over counts, or counts differ over seeds.
    """
    first = parts[arm][seeds[0]][1]
    for seed in seeds:
        sums, counts = parts[arm][seed]
        if not np.array_equal(counts, first):
            raise ValueError(f"the seeds {seeds[0]} and {seed} of {arm} were evaluated on different samples")
        made, outcome = sums.sum() / counts.sum(), outcomes[arm][seed]
        if not math.isclose(made, outcome, rel_tol=1e-5):  # losses are summed in float32 and in another order
            raise ValueError(f"the parts of {arm}, seed {seed}, make {made:.6g}; its outcome is {outcome:.6g}")
    return np.array([parts[arm][seed][0] for seed in seeds]), first


def _gains(pairs: np.ndarray) -> np.ndarray:
    """What an arm is better by at each seed; a run that diverged is worse by the largest difference of finished ones.

    Under the hypothesis that arm and baseline are alike, each sign of these is as likely as the other, whatever their
    size, which is all that the sign-flip test asks for.
    """
    finished = np.isfinite(pairs)
    both = finished.all(1)
    found = np.zeros(len(pairs))
    found[both] = pairs[both, 0] - pairs[both, 1]
    largest = np.abs(found).max(initial=0) or 1.0
    found[~both] = largest * (finished[~both, 0].astype(float) - finished[~both, 1])
    return found


def _numbers(pairs: _Pairs, sign: int, smallest_effect: float, arms: int) -> dict[str, Any]:
    """Those of a `Comparison` that are made from finished pairs; empty with fewer than two."""
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
    """The one word for an arm.

    Equivalent, where both one-sided tests put the difference inside the smallest effect of interest, also if it is
    surely not zero. Otherwise better or worse, where the sign-flip test rejects, and the two-way test where there is
    one, with enough seeds; of the two, the one that diverged more often is never the better one. Otherwise
    inconclusive.

    Args:
        gains: Differences, positive where the arm is better.
        p: Of the difference, adjusted for the number of arms.
        p_equivalence: Of equivalence, adjusted likewise.
        enough: Whether there are as many seeds as planned for a verdict.
        diverged: Runs of the arm and of the baseline.
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
