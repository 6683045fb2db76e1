"""Power analysis: how many seeds are needed to find a difference."""

from __future__ import annotations

import functools
import math

import numpy as np

from .estimates import ALPHA, scipy_stats, sign_flips

POWER = 0.8
_MOST_SEEDS = 10_000


def further_seeds(
    differences: np.ndarray, smallest_effect: float, min_seeds: int, arms: int = 1, floor: float = 0.0
) -> int | None:
    """Computes how many more seeds would settle a comparison with power 0.8, if mean and spread stay as observed.

    Args:
        differences: Differences so far.
        smallest_effect: The smallest effect of interest. A smaller mean can be shown to be equivalent, and any mean
            other than zero to be different.
        min_seeds: Smallest total number of seeds for a verdict.
        arms: Number of arms that share alpha. The first step of Holm's adjustment is assumed.
        floor: The part of the mean's variance that more seeds do not reduce; see `Components.groups`.

    Returns:
        The number of further seeds, or None if 10,000 would not be enough.
    """
    mean, spread, have = abs(float(differences.mean())), float(differences.std(ddof=1)), len(differences)
    alpha = ALPHA / arms

    def settles(n: int) -> bool:
        error = math.sqrt(spread**2 / n + floor)
        if error == 0:
            return mean < smallest_effect or 2 / 2**n <= alpha
        different = power(n, mean / spread if spread else math.inf, alpha)
        if floor:
            different = min(different, _t_power(n, mean / error, alpha / 2))
        if different >= POWER:
            return True
        shifts = smallest_effect - mean, smallest_effect + mean
        return sum(_t_power(n, shift / error, alpha) for shift in shifts) - 1 >= POWER

    if not settles(_MOST_SEEDS):
        return None
    low, high = max(2, min_seeds) - 1, _MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if settles(middle) else (middle, high)
    return max(1, high - have)


def power(seeds: int, effect: float, alpha: float) -> float:
    """Computes how often the sign-flip test rejects for normal differences.

    Up to 12 seeds it is simulated, because its p cannot be below 2 / 2^seeds and it is weaker than Student's t test.
    Above, the power of Student's t test is used.

    Args:
        seeds: Number of pairs.
        effect: True mean of the differences, in units of their standard deviation.
        alpha: Level of the test, which rejects if p <= alpha.
    """
    if 2 / 2**seeds > alpha:
        return 0.0
    if seeds > 12 or math.isinf(effect):
        return _t_power(seeds, effect * math.sqrt(seeds), alpha / 2)
    drawn, sums = _drawn(seeds)
    seen = np.abs(drawn.sum(1) + seeds * effect)[:, None]
    p = np.mean(np.abs(sums + sign_flips(seeds).sum(1) * effect) >= seen * (1 - 1e-12), axis=1)
    return float(np.mean(p <= alpha))


@functools.lru_cache
def _drawn(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws standard normal differences (2000, seeds), and their sums under all flips (2000, 2^(seeds - 1))."""
    drawn = np.random.default_rng(0).normal(size=(2000, seeds))
    return drawn, drawn @ sign_flips(seeds).T


def _t_power(seeds: int, shift: float, alpha: float) -> float:
    """Computes how often the one-sided t test rejects, for a true mean of `shift` standard errors.

    It uses scipy, or the normal approximation where scipy's series does not converge. There it is good to three digits.
    """
    stats, degrees = scipy_stats(), seeds - 1
    quantile = stats.t.ppf(1 - alpha, degrees)
    if degrees > 200 or abs(shift) > 30:
        return float(stats.norm.sf(quantile - shift))
    return float(stats.nct.sf(quantile, degrees, shift))


def minimum_detectable_effect(seeds: int, arms: int = 1) -> float:
    """Computes the true difference that is found with power 0.8, in standard deviations of paired differences.

    Args:
        seeds: Number of pairs.
        arms: Number of arms that share alpha. The first step of Holm's adjustment is assumed.

    Returns:
        The difference, or infinity if the sign-flip test can never reject.
    """
    low, high = 0.0, 100.0
    if power(seeds, high, ALPHA / arms) < POWER:
        return math.inf
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if power(seeds, middle, ALPHA / arms) >= POWER else (middle, high)
    return high
