"""How many seeds find which differences, against simulation."""

import math

import numpy as np
import pytest

from hf_gem.compare import power
from hf_gem.compare.estimates import over_seeds, sign_flip_p
from hf_gem.compare.stats import verdict

scipy_stats = pytest.importorskip("scipy.stats", reason="verdicts are made by it")


@pytest.mark.parametrize(
    ("mean", "smallest_effect"),
    [(0.8, 0.1), (0.8, 1.1), (0.3, 0.75), (0.0, 0.75)],  # where a difference is found, and where equivalence is
)
def test_as_many_further_seeds_settle_it_as_promised(mean, smallest_effect):
    draw = np.random.default_rng(4)
    seen = draw.normal(0, 1, 6)
    seen = (seen - seen.mean()) / seen.std(ddof=1) + mean  # standard deviation 1
    seeds = 6 + power.further_seeds(seen, smallest_effect, 2)

    def settled(seeds, studies=400):
        verdicts = []
        for _ in range(studies):
            differences = draw.normal(mean, 1, seeds)
            p = scipy_stats.ttest_1samp(differences, 0).pvalue if seeds > 12 else sign_flip_p(differences)
            equivalence = over_seeds(differences).p_equivalence(smallest_effect)
            verdicts.append(verdict(differences, p, equivalence, enough=True, diverged=(0, 0)))
        return 1 - verdicts.count("inconclusive") / studies

    slack = 3 * math.sqrt(0.8 * 0.2 / 400)
    assert settled(seeds) >= 0.8 - slack
    assert settled(seeds // 2) < 0.8  # and not many more than are needed
    assert power.further_seeds(seen - mean, 1e-9, 2) is None


def test_more_seeds_find_smaller_effects_and_more_arms_larger_ones():
    effects = [power.minimum_detectable_effect(n) for n in (4, 8, 16, 32)]
    assert effects == sorted(effects, reverse=True)
    assert effects[1] == pytest.approx(1.16, abs=0.02)  # of tables of the power of the t test, n = 8
    assert power.minimum_detectable_effect(8, arms=3) > effects[1]


@pytest.mark.parametrize(("seeds", "alpha"), [(8, 0.05), (8, 0.0125), (10, 0.01), (14, 0.01)])
def test_the_power_of_the_sign_flip_test(seeds, alpha):
    draw, effect = np.random.default_rng(6), 1.4
    rejected = np.mean([sign_flip_p(draw.normal(effect, 1, seeds)) <= alpha for _ in range(300)])
    promised = power.power(seeds, effect, alpha)
    # both are shares, of 300 and of 2,000 draws; from 13 seeds on it is Student's t test's
    slack = 3 * math.sqrt(promised * (1 - promised) * (1 / 300 + 1 / 2000))
    assert rejected == pytest.approx(promised, abs=slack + (0.02 if seeds > 12 else 0))


def test_where_the_sign_flip_test_cannot_reject():
    assert power.power(8, 100.0, 0.05 / 7) == 0  # its smallest p is 2 / 2^8
    assert power.minimum_detectable_effect(8, 7) == math.inf
    assert power.minimum_detectable_effect(8, 4) < 2


def test_seeds_cannot_settle_what_documents_leave_open():
    draw = np.random.default_rng(5)
    seen = draw.normal(0, 1, 8)
    seen = (seen - seen.mean()) / seen.std(ddof=1) + 0.8
    without = power.further_seeds(seen, 1e-3, 8)
    assert power.further_seeds(seen, 1e-3, 8, floor=1e-9) in (without, without + 1)  # the t test is no weaker
    assert power.further_seeds(seen, 1e-3, 8, floor=0.03) > without
    assert power.further_seeds(seen, 1e-3, 8, floor=0.2) is None  # the mean is 1.8 such standard errors from zero
    same = np.full(8, 0.8)
    assert power.further_seeds(same, 1.0, 8, floor=0.001) == 1
    assert power.further_seeds(same, 1e-3, 8, floor=1.0) is None
