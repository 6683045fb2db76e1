"""Studies whose truth is known."""

import math

import numpy as np
import pytest

# How many studies are simulated: enough to notice what is plainly wrong, and what is promised, to within a percent.
STUDIES = pytest.mark.parametrize("studies", [400, pytest.param(2000, marks=pytest.mark.slow)])


def simulate(seeds, difference, draw, spread=0.01, shared=0.02, arms=1):
    """Outcomes of a baseline and arms that share the noise of a seed, as paired runs do."""
    common = draw.normal(0, shared, seeds)
    base = 3 + common + draw.normal(0, spread, seeds)
    found = {"base": dict(enumerate(base))}
    for arm in range(arms):
        found[f"arm{arm}"] = dict(enumerate(3 + difference + common + draw.normal(0, spread, seeds)))
    return found


def rate_bound(rate, studies):
    """A rate and three standard errors of its estimate."""
    return rate + 3 * math.sqrt(rate * (1 - rate) / studies)


def lengths(groups, draw, uneven):
    """Tokens of documents: all alike, or log-normal."""
    return np.ceil(draw.lognormal(6, 1, groups)) if uneven else np.full(groups, 500.0)


def crossed(seeds, groups, shares, draw, difference=0.0, uneven=False, arms=1):
    """Outcomes and parts of a baseline and arms, by seed and document; a mean difference has a variance of 0.01^2.

    Args:
        seeds: Their number.
        groups: That of documents.
        shares: Of the variance: what varies over seeds, over documents, and over both.
        draw: Of random numbers.
        difference: The true one.
        uneven: Whether documents differ in length.
        arms: Beside the baseline.
    """
    counts = lengths(groups, draw, uneven)
    squares = np.sum((counts / counts.sum()) ** 2)
    of_seeds, of_groups, of_both = (
        0.01 * math.sqrt(share / 2 / size)
        for share, size in zip(shares, (1 / seeds, squares, squares / seeds), strict=True)
    )
    common = 3 + draw.normal(0, 0.02, (seeds, 1)) + draw.normal(0, 0.3, groups)
    outcomes, parts = {}, {}
    for arm in ("base", *(f"arm{number}" for number in range(arms))):
        own = draw.normal(0, of_seeds, (seeds, 1)) + draw.normal(0, of_groups, groups)
        sums = (common + own + draw.normal(0, of_both, (seeds, groups)) + difference * (arm != "base")) * counts
        outcomes[arm] = dict(enumerate(sums.sum(1) / counts.sum()))
        parts[arm] = {seed: np.array([row, counts]) for seed, row in enumerate(sums)}
    return outcomes, parts
