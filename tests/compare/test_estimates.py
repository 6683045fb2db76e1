"""Tests, intervals and adjustments, against simulation and against what can be counted by hand."""

import itertools
import math

import numpy as np
import pytest

from hf_gem.compare import estimates
from tests.compare.simulated import STUDIES

pytest.importorskip("scipy.stats", reason="verdicts are made by it")


@pytest.mark.parametrize("seeds", [8, 10])
@pytest.mark.parametrize("noise", ["normal", "skewed"])
@STUDIES
def test_intervals_cover_as_promised(seeds, noise, studies):
    draw = np.random.default_rng(3)
    covered = {"t": 0, "bca": 0}
    for _ in range(studies):
        drawn = draw.normal(0, 1, seeds) if noise == "normal" else draw.gamma(4, 0.5, seeds) - 2
        for name, (low, high) in (
            ("t", estimates.over_seeds(drawn).interval()),
            ("bca", estimates.bca_interval(drawn, resamples=600)),
        ):
            covered[name] += low <= 0 <= high
    slack = 3 * math.sqrt(0.05 * 0.95 / studies)
    # Few and skewed differences are covered less often by any interval made of them alone.
    least = 0.95 - slack - (0.0 if noise == "normal" else 0.02)
    assert least <= covered["t"] / studies <= 0.95 + slack
    # of percentiles estimated from 600 resamples
    assert least - 0.01 <= covered["bca"] / studies <= 0.95 + slack + 0.01


def test_the_sign_flip_test_counts_all_flips():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.25])
    flips = np.array(list(itertools.product((1, -1), repeat=5))) * differences
    share = np.mean(np.abs(flips.mean(1)) >= abs(differences.mean()) - 1e-12)
    assert estimates.sign_flip_p(differences) == pytest.approx(share)
    assert estimates.sign_flip_p(np.zeros(5)) == 1
    assert estimates.sign_flip_p(np.ones(8)) == 2 / 2**8
    assert estimates.sign_flip_p(np.ones(1)) == 1


def test_the_sign_flip_test_counts_ties():
    draw = np.random.default_rng(8)
    for _ in range(50):
        hits = draw.integers(0, 20, (2, 8))  # of 359
        flips = np.array(list(itertools.product((1, -1), repeat=8))) * (hits[0] - hits[1])
        share = np.mean(np.abs(flips.sum(1)) >= abs((hits[0] - hits[1]).sum()))
        assert estimates.sign_flip_p(hits[0] / 359 - hits[1] / 359) == pytest.approx(share)


def test_holm():
    assert estimates.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert estimates.holm([0.5, 0.9]) == [1.0, 1.0]
    assert estimates.holm([]) == []


def test_interquartile_mean():
    tasks = [np.array([0.0, 1, 2, 3]), np.array([2.0, 4, 5, 90])]
    mean, low, high = estimates.interquartile_mean(tasks, resamples=500)
    assert mean == (2 + 2 + 3 + 4) / 4  # of 0 1 | 2 2 3 4 | 5 90
    assert low < mean < high


@pytest.mark.parametrize(("tasks", "seeds"), [(2, 4), (3, 8)])
def test_the_interval_of_an_interquartile_mean_covers_as_promised(tasks, seeds):
    draw, studies = np.random.default_rng(7), 600
    covered = 0
    for _ in range(studies):
        _, low, high = estimates.interquartile_mean([draw.normal(0, 1, seeds) for _ in range(tasks)], resamples=400)
        covered += low <= 0 <= high
    slack = 3 * math.sqrt(0.05 * 0.95 / studies) + 0.01
    assert 0.95 - slack <= covered / studies <= 0.95 + slack


def test_the_expected_best_of_some_tries():
    values = [1.0, 4.0, 2.0]
    every = [max(pair) for pair in itertools.product(values, repeat=2)]
    assert estimates.expected_best_of(values, 2, True) == pytest.approx(np.mean(every))
    assert estimates.expected_best_of(values, 1, False) == pytest.approx(np.mean(values))
    lows = [min(triple) for triple in itertools.product(values, repeat=3)]
    assert estimates.expected_best_of(values, 3, False) == pytest.approx(np.mean(lows))
