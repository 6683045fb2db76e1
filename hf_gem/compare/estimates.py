"""Statistics of paired differences: tests, intervals, and adjustments for multiple comparisons."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.errors import needed_for

ALPHA = 0.05
_RESAMPLES = 9999


@functools.cache
def scipy_stats() -> Any:
    """Imports `scipy.stats`, which is only needed to judge a study, not to run it."""
    with needed_for("judging a study"):
        from scipy import stats
    return stats


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, for inference by Student's t.

    Attributes:
        mean: Mean of the differences.
        error: Standard error of the mean.
        degrees: Degrees of freedom of the standard error.
    """

    mean: float
    error: float
    degrees: float

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Computes the interval of means that `p` does not reject at level alpha."""
        half = float(scipy_stats().t.ppf(1 - alpha / 2, self.degrees)) * self.error
        return self.mean - half, self.mean + half

    def p(self, mean: float = 0.0) -> float:
        """Computes the two-sided p of the hypothesis that the true mean is `mean`."""
        return min(1.0, 2 * self._p_above(abs(self.mean - mean)))

    def p_equivalence(self, smallest_effect: float) -> float:
        """Computes the larger p of two one-sided tests: mean <= -smallest_effect, and mean >= smallest_effect."""
        return self._p_above(smallest_effect - abs(self.mean))

    def _p_above(self, distance: float) -> float:
        """Computes the one-sided p of an estimate at this distance above the tested mean."""
        if self.error == 0:
            return 1.0 if distance <= 0 else 0.0
        return float(scipy_stats().t.sf(distance / self.error, self.degrees))


def over_seeds(differences: np.ndarray) -> Estimate:
    """Estimates the mean of two or more differences, with a standard error that only counts seeds."""
    size = len(differences)
    return Estimate(float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(size), size - 1)


def sign_flip_p(differences: np.ndarray) -> float:
    """Computes the two-sided p of the sign-flip test: how often random signs give a mean this far from zero.

    It assumes that the differences are symmetric about zero, and is exact for up to 16 of them.
    """
    if not np.any(differences):
        return 1.0
    if len(differences) > 16:
        found = scipy_stats().permutation_test(
            (differences,),
            lambda x, axis: np.mean(x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=100_000,
            rng=np.random.default_rng(0),
        )
        return float(found.pvalue)
    # Not scipy's: differences of accuracies tie up to rounding, which is proportional to their size, not their mean.
    sums, size = sign_flips(len(differences)) @ differences, np.abs(differences).sum()
    return float(np.mean(np.abs(sums) >= abs(differences.sum()) - 1e-12 * size))


@functools.lru_cache
def sign_flips(seeds: int) -> np.ndarray:
    """Returns all sign patterns (2^(seeds - 1), seeds), without those that only flip all signs of another."""
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=seeds - 1))).reshape(2 ** (seeds - 1), seeds - 1)
    return np.hstack([np.ones((len(signs), 1)), signs])


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's step-down adjustment, which keeps the chance of any false rejection at level alpha below alpha."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(scaled))
    return [float(p) for p in adjusted]


def bca_interval(differences: np.ndarray, resamples: int = _RESAMPLES) -> tuple[float, float]:
    """Computes a 95 % interval of the mean by the bias-corrected and accelerated bootstrap, widened for few seeds.

    Percentiles of a bootstrap are too narrow: they are those of a normal distribution whose variance is too small by
    (n - 1) / n. Wider percentiles, as in Hesterberg 2015 (arXiv 1411.5279, section 4.2.3), restore the coverage.
    """
    n = len(differences)
    if differences.std() == 0:
        return float(differences[0]), float(differences[0])
    if n < 3:
        return math.nan, math.nan  # two differences are too few to estimate the acceleration
    stats = scipy_stats()
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


def interquartile_mean(tasks: Sequence[np.ndarray], resamples: int = _RESAMPLES) -> tuple[float, float, float]:
    """Computes the mean of the middle half of all outcomes, and its 95 % interval by resampling seeds within each task.

    This follows rliable (Agarwal et al. 2021, arXiv 2108.13264), with a correction for few seeds: the variance of the
    resampled outcomes around the mean of their task is scaled by n / (n - 1), and the percentiles are widened from the
    normal distribution to Student's t. Outcomes of different tasks must be comparable. A task whose outcomes all lie in
    the outer quarters contributes only through its ranks.

    Args:
        tasks: For each task, one outcome per seed, for at least two seeds.
        resamples: Number of bootstrap resamples.
    """
    draw = np.random.default_rng(0)
    parts = []
    for task in tasks:
        n, mean = len(task), np.mean(task)
        parts.append(mean + math.sqrt(n / (n - 1)) * (draw.choice(task, (resamples, n)) - mean))
    degrees = sum(len(task) - 1 for task in tasks)
    stats = scipy_stats()
    tail = stats.norm.cdf(-stats.t.ppf(1 - ALPHA / 2, degrees))
    low, high = np.quantile(stats.trim_mean(np.concatenate(parts, axis=1), 0.25, axis=1), [tail, 1 - tail])
    return float(stats.trim_mean(np.concatenate(tasks), 0.25)), float(low), float(high)


def expected_best_of(values: Sequence[float], tries: int, higher_is_better: bool) -> float:
    """Computes the expected best outcome of some tries drawn from `values` (Dodge et al. 2019, arXiv 1909.03004)."""
    ordered = np.sort(values) if higher_is_better else np.sort(values)[::-1]
    share = np.arange(len(ordered) + 1) / len(ordered)
    return float(ordered @ np.diff(share**tries))
