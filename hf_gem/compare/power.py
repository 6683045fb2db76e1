"""How many seeds find which differences."""

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
    """How many more seeds settle it with power 0.8, one way or the other, if mean and spread are those that were seen.

    Args:
        differences: So far.
        smallest_effect: A mean inside it can be shown equivalent, any but zero to be different from that.
        min_seeds: Fewer than these in all settle nothing.
        arms: How many share alpha; the first step of Holm's adjustment is assumed.
        floor: The part of the mean's variance that no seeds make smaller; see `Components.groups`.

    Returns:
        None where 10,000 would not do.
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
    if seeds > 12 or math.isinf(effect):
        return _t_power(seeds, effect * math.sqrt(seeds), alpha / 2)
    drawn, sums = _drawn(seeds)
    seen = np.abs(drawn.sum(1) + seeds * effect)[:, None]
    p = np.mean(np.abs(sums + sign_flips(seeds).sum(1) * effect) >= seen * (1 - 1e-12), axis=1)
    return float(np.mean(p <= alpha))


@functools.lru_cache
def _drawn(seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Standard normal differences, (2000, seeds), and their sums by all flips, (2000, 2^(seeds - 1))."""
    drawn = np.random.default_rng(0).normal(size=(2000, seeds))
    return drawn, drawn @ sign_flips(seeds).T


def _t_power(seeds: int, shift: float, alpha: float) -> float:
    """How often the one-sided t test rejects, for a true mean of `shift` standard errors.

    By scipy, and normal where that is good to three digits and scipy's series does not converge.
    """
    stats, degrees = scipy_stats(), seeds - 1
    quantile = stats.t.ppf(1 - alpha, degrees)
    if degrees > 200 or abs(shift) > 30:
        return float(stats.norm.sf(quantile - shift))
    return float(stats.nct.sf(quantile, degrees, shift))


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
