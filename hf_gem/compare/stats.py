"""What a study says of an arm against its baseline, from one outcome for each seed.

Arms of a seed share initial weights, data order and all other randomness, so their outcomes are compared seed by seed.
The unpaired comparison stands beside it, since pairing helps only as far as the outcomes are correlated. Differences
are arm minus baseline, in the unit of the metric.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..training.errors import needed_for

ALPHA = 0.05
POWER = 0.8
_RESAMPLES = 9999
_MOST_SEEDS = 10_000

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
        p_holm: The same, adjusted by Holm for the number of arms.
        verdict: See `verdict`; pending, as long as runs are missing.
        further_seeds: How many more would settle an inconclusive comparison, if what was seen is the truth; None where
            it is settled, or no number is enough.
        barred: Whether the one with the better mean of the two diverged more often, which no number of seeds undoes.
        difference: Mean of the differences.
        interval: 95 % interval of that, by the BCa bootstrap.
        t_interval: The same by Student's t, which is exact for normal differences.
        d_z: Mean over standard deviation of the differences.
        correlation: Of the outcomes of the two, over seeds.
        superiority: Share of seeds at which the arm is better; a tie is half.
        p_equivalence: The larger p of the two one-sided t tests against the smallest effect of interest.
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
    p_holm: float
    verdict: Verdict
    further_seeds: int | None = None
    barred: bool = False
    difference: float = math.nan
    interval: tuple[float, float] = (math.nan, math.nan)
    t_interval: tuple[float, float] = (math.nan, math.nan)
    d_z: float = math.nan
    correlation: float = math.nan
    superiority: float = math.nan
    p_equivalence: float = math.nan
    welch_interval: tuple[float, float] = (math.nan, math.nan)
    welch_p: float = math.nan


@functools.cache
def _scipy() -> Any:
    """`scipy.stats`, which is needed when a study is judged, and not when its runs are made."""
    with needed_for("judging a study"):
        from scipy import stats
    return stats


def compare(
    outcomes: Mapping[str, Mapping[int, float]],
    baseline: str,
    smallest_effect: float,
    higher_is_better: bool,
    min_seeds: int,
) -> list[Comparison]:
    """Compares every arm with the baseline.

    Args:
        outcomes: Arm -> seed -> outcome; NaN or infinite where the run diverged.
        baseline: The arm that the others are compared with.
        smallest_effect: Differences smaller than this are of no interest, in the unit of the metric.
        higher_is_better: Whether the metric is to be large.
        min_seeds: With fewer pairs than this, no arm is called better or worse.

    Raises:
        ValueError: the baseline is no arm.
    """
    if baseline not in outcomes:
        raise ValueError(f"baseline {baseline!r} is no arm; the arms are {', '.join(outcomes)}")
    sign = 1 if higher_is_better else -1
    both = {arm: sorted(outcomes[arm].keys() & outcomes[baseline].keys()) for arm in outcomes if arm != baseline}
    pairs = {arm: np.array([(outcomes[arm][s], outcomes[baseline][s]) for s in seeds]).reshape(-1, 2)
             for arm, seeds in both.items()}  # fmt: skip
    gains = {arm: _gains(sign * values) for arm, values in pairs.items()}
    raw = [sign_flip_p(found) for found in gains.values()]
    compared = []
    for arm, p, p_holm in zip(pairs, raw, holm(raw), strict=True):
        finished = np.isfinite(pairs[arm]).all(1)
        values, base = pairs[arm][finished].T
        diverged = (_diverged(outcomes[arm]), _diverged(outcomes[baseline]))
        numbers = _numbers(values, base, sign, smallest_effect) if len(values) > 1 else {}
        # Of finished pairs alone, of which there have to be enough: two that agree are no ground for "equivalent".
        equivalence = numbers["p_equivalence"] if numbers and len(values) >= min_seeds else 1.0
        found = verdict(gains[arm], p_holm, equivalence, enough=len(gains[arm]) >= min_seeds, diverged=diverged)
        ahead = float(np.sign(gains[arm].sum()))
        barred = found == "inconclusive" and ahead * (diverged[0] - diverged[1]) > 0
        compared.append(
            Comparison(
                arm=arm,
                seeds=tuple(np.array(both[arm])[finished].tolist()),
                values=tuple(values.tolist()),
                baseline=tuple(base.tolist()),
                pairs=len(gains[arm]),
                diverged=diverged,
                p=p,
                p_holm=p_holm,
                verdict=found,
                further_seeds=further_seeds(values - base, smallest_effect, min_seeds, len(pairs))
                if numbers and found == "inconclusive" and not barred
                else None,
                barred=barred,
                **numbers,
            )
        )
    return compared


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


def _numbers(values: np.ndarray, base: np.ndarray, sign: int, smallest_effect: float) -> dict[str, Any]:
    """Those of a `Comparison` that are made from finished pairs."""
    differences = values - base
    welch = _scipy().ttest_ind(values, base, equal_var=False)
    welch_interval = welch.confidence_interval(1 - ALPHA)
    varies = values.std() > 0 and base.std() > 0
    return {
        "difference": float(differences.mean()),
        "interval": bca_interval(differences),
        "t_interval": t_interval(differences),
        "d_z": _standardised(differences),
        "correlation": float(np.corrcoef(values, base)[0, 1]) if varies else math.nan,
        "superiority": float(np.mean((sign * differences > 0) + 0.5 * (differences == 0))),
        "p_equivalence": equivalence_p(differences, smallest_effect),
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
    surely not zero. Otherwise better or worse, where the sign-flip test rejects after Holm's adjustment, with enough
    seeds; of the two, the one that diverged more often is never the better one. Otherwise inconclusive.

    Args:
        gains: Differences, positive where the arm is better.
        p: Adjusted.
        p_equivalence: Of `equivalence_p`.
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


def sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p that differences symmetric about zero have a mean this far from it; exact up to 16 of them."""
    if not np.any(differences):
        return 1.0
    if len(differences) > 16:
        found = _scipy().permutation_test(
            (differences,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=100_000,
            rng=np.random.default_rng(0),
        )
        return float(found.pvalue)
    # Not by scipy: differences of accuracies tie, but for rounding in proportion to their size and not to their mean.
    sums, size = _flips(len(differences)) @ differences, np.abs(differences).sum()
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12 * size))


@functools.lru_cache
def _flips(seeds: int) -> np.ndarray:
    """All signs of some differences, (2^(seeds - 1), seeds), but for those with all signs turned."""
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=seeds - 1))).reshape(2 ** (seeds - 1), seeds - 1)
    return np.hstack([np.ones((len(signs), 1)), signs])


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: compared with alpha, they keep the chance of any false rejection below it."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(p) for p in adjusted]


def bca_interval(differences: np.ndarray, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean by the bias-corrected and accelerated bootstrap, widened for few seeds.

    Percentiles of a bootstrap are those of a normal distribution with a variance too small by (n - 1) / n. They are
    taken further out, as in Hesterberg 2015 (arXiv 1411.5279, section 4.2.3), so that the interval covers as promised.
    """
    n = len(differences)
    if differences.std() == 0:
        return float(differences[0]), float(differences[0])
    if n < 3:
        return math.nan, math.nan  # leaving one out leaves nothing to estimate the acceleration from
    stats = _scipy()
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(1 - ALPHA / 2, n - 1))
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        confidence_level=1 - 2 * tail,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def t_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean by Student's t."""
    low, high = _scipy().ttest_1samp(differences, 0).confidence_interval(1 - ALPHA)
    return float(low), float(high)


def equivalence_p(differences: np.ndarray, smallest_effect: float) -> float:
    """The larger p of two one-sided t tests: that the mean is not above -smallest_effect, and not below it."""
    if differences.std() == 0:
        return 0.0 if abs(differences[0]) < smallest_effect else 1.0
    stats = _scipy()
    above = stats.ttest_1samp(differences, -smallest_effect, alternative="greater").pvalue
    below = stats.ttest_1samp(differences, smallest_effect, alternative="less").pvalue
    return float(max(above, below))


def further_seeds(differences: np.ndarray, smallest_effect: float, min_seeds: int, arms: int = 1) -> int | None:
    """How many more seeds settle it with power 0.8, one way or the other, if mean and spread are those that were seen.

    Args:
        differences: So far.
        smallest_effect: A mean inside it can be shown equivalent, any but zero to be different from that.
        min_seeds: Fewer than these in all settle nothing.
        arms: How many share alpha; the first step of Holm's adjustment is assumed.

    Returns:
        None where 10,000 would not do.
    """
    mean, spread, have = abs(float(differences.mean())), float(differences.std(ddof=1)), len(differences)
    alpha = ALPHA / arms

    def settles(n: int) -> bool:
        if spread == 0:
            return mean < smallest_effect or 2 / 2**n <= alpha
        if power(n, mean / spread, alpha) >= POWER:
            return True
        scale = math.sqrt(n) / spread
        one_sided = _scipy().t.ppf(1 - ALPHA, n - 1)
        misses = (
            _noncentral_t_cdf(one_sided, n - 1, shift * scale)
            for shift in (smallest_effect - mean, smallest_effect + mean)
        )
        return 1 - sum(misses) >= POWER

    if not settles(_MOST_SEEDS):
        return None
    low, high = max(2, min_seeds) - 1, _MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settles(middle) else (middle, high)
    return max(1, high - have)


def _noncentral_t_cdf(x: float, degrees: int, shift: float) -> float:
    """By scipy, and normal where that is good to three digits and scipy's series does not converge."""
    if degrees > 200 or shift > 30:
        return float(_scipy().norm.cdf(x - shift))
    return float(_scipy().nct.cdf(x, degrees, shift))


@functools.lru_cache
def _drawn(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal differences, (2000, seeds), and their sums by all flips, (2000, 2^(seeds - 1))."""
    drawn = np.random.default_rng(0).normal(size=(2000, seeds))
    return drawn, drawn @ _flips(seeds).T


def power(seeds: int, effect: float, alpha: float) -> float:
    """How often the sign-flip test rejects, for normal differences.

    By simulation up to 12 seeds, where its p cannot be below 2 / 2^seeds and it is weaker than Student's t test; from
    there on by that.

    Args:
        seeds: Pairs.
        effect: True mean of the differences, in their standard deviations.
        alpha: Rejected where p is not above it.
    """
    if 2 / 2**seeds > alpha:
        return 0.0
    if seeds > 12:
        quantile = _scipy().t.ppf(1 - alpha / 2, seeds - 1)
        return 1 - _noncentral_t_cdf(quantile, seeds - 1, effect * math.sqrt(seeds))
    drawn, sums = _drawn(seeds)
    seen = np.abs(drawn.sum(1) + seeds * effect)[:, None]
    p = np.mean(np.abs(sums + _flips(seeds).sum(1) * effect) >= seen * (1 - 1e-12), axis=1)
    return float(np.mean(p <= alpha))


def minimum_detectable_effect(seeds: int, arms: int = 1) -> float:
    """The true difference that is found with power 0.8, in standard deviations of the differences of a pair.

    Args:
        seeds: Pairs.
        arms: How many share alpha; the first step of Holm's adjustment is assumed.

    Returns:
        Infinity where the sign-flip test cannot reject, whatever it is given.
    """
    low, high = 0.0, 100.0
    if power(seeds, high, ALPHA / arms) < POWER:
        return math.inf
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if power(seeds, middle, ALPHA / arms) >= POWER else (middle, high)
    return high


def interquartile_mean(tasks: Sequence[np.ndarray], resamples: int = _RESAMPLES) -> tuple[float, float, float]:
    """Mean of the middle half of all outcomes over tasks, and its 95 % interval by resampling seeds within each task.

    As in rliable (Agarwal et al. 2021, arXiv 2108.13264), but for the widening that few seeds need: what is drawn
    spreads by n / (n - 1) more around the mean of its task, and percentiles are taken as far out as Student's t is
    from the normal. Outcomes of different tasks have to be comparable. A task whose outcomes all lie in the outer
    quarters counts for its ranks alone.

    Args:
        tasks: For each, one outcome a seed, of two or more.
        resamples: Of the bootstrap.
    """
    draw = np.random.default_rng(0)
    parts = []
    for task in tasks:
        n, mean = len(task), np.mean(task)
        parts.append(mean + math.sqrt(n / (n - 1)) * (draw.choice(task, (resamples, n)) - mean))
    degrees = sum(len(task) - 1 for task in tasks)
    stats = _scipy()
    tail = stats.norm.cdf(-stats.t.ppf(1 - ALPHA / 2, degrees))
    low, high = np.quantile(stats.trim_mean(np.concatenate(parts, axis=1), 0.25, axis=1), [tail, 1 - tail])
    return float(stats.trim_mean(np.concatenate(tasks), 0.25)), float(low), float(high)


def expected_best_of(values: Sequence[float], tries: int, higher_is_better: bool) -> float:
    """The expected outcome of the best of some tries, drawn from those seen (Dodge et al. 2019, arXiv 1909.03004)."""
    ordered = np.sort(values) if higher_is_better else np.sort(values)[::-1]
    share = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(share**tries))
