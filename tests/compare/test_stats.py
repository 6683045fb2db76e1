"""The statistics against simulated studies whose truth is known, and against what can be counted by hand."""

import itertools
import math

import numpy as np
import pytest

from hf_gem.compare import stats
from hf_gem.compare.stats import compare

scipy_stats = pytest.importorskip("scipy.stats", reason="verdicts are made by it")

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


@pytest.fixture
def quick(monkeypatch):
    """Without the bootstrap, which no verdict depends on."""
    monkeypatch.setattr(stats, "bca_interval", lambda differences: (0.0, 0.0))
    monkeypatch.setattr(stats, "further_seeds", lambda *_: None)


@STUDIES
@pytest.mark.parametrize(("seeds", "arms", "kind"), [(8, 1, ""), (10, 3, ""), (8, 1, "ties"), (8, 1, "diverges")])
def test_false_positives_are_as_rare_as_promised(quick, seeds, arms, kind, studies):
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(studies):
        outcomes = simulate(seeds, 0.0, draw, arms=arms)
        for runs in outcomes.values():
            for seed, value in runs.items():
                lost = kind == "diverges" and draw.random() < 0.2
                runs[seed] = math.nan if lost else round(value * 100) / 100 if kind == "ties" else value
        found = compare(outcomes, "base", 1e-6, False, 8)
        wrong += any(c.verdict in ("better", "worse") for c in found)
    assert wrong / studies <= rate_bound(0.05, studies)
    assert wrong > 0  # the test can fail


def test_verdicts_are_right_where_the_truth_is_plain(quick):
    draw = np.random.default_rng(1)
    for difference, higher_is_better, expected in (
        (-0.05, False, "better"),
        (0.05, False, "worse"),
        (0.05, True, "better"),
    ):
        verdicts = [
            compare(simulate(10, difference, draw), "base", 0.005, higher_is_better, 8)[0].verdict for _ in range(300)
        ]
        assert verdicts.count(expected) >= 295
    verdicts = [compare(simulate(10, 0.0, draw), "base", 0.03, False, 8)[0].verdict for _ in range(300)]
    assert verdicts.count("equivalent") >= 295
    verdicts = [compare(simulate(10, 0.0, draw), "base", 0.001, False, 8)[0].verdict for _ in range(300)]
    assert verdicts.count("inconclusive") >= 270


@STUDIES
def test_equivalence_is_not_claimed_at_its_edge(quick, studies):
    """At a true difference of exactly the smallest effect the claim is false, and made at most once in twenty."""
    draw = np.random.default_rng(2)
    claims = sum(
        compare(simulate(10, 0.02, draw), "base", 0.02, False, 8)[0].verdict == "equivalent" for _ in range(studies)
    )
    assert claims / studies <= rate_bound(0.05, studies)


@pytest.mark.parametrize("seeds", [8, 10])
@pytest.mark.parametrize("noise", ["normal", "skewed"])
@STUDIES
def test_intervals_cover_as_promised(seeds, noise, studies):
    draw = np.random.default_rng(3)
    covered = {"t": 0, "bca": 0}
    for _ in range(studies):
        drawn = draw.normal(0, 1, seeds) if noise == "normal" else draw.gamma(4, 0.5, seeds) - 2
        for name, (low, high) in (("t", stats.t_interval(drawn)), ("bca", stats.bca_interval(drawn, resamples=600))):
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
    assert stats.sign_flip_p(differences) == pytest.approx(share)
    assert stats.sign_flip_p(np.zeros(5)) == 1
    assert stats.sign_flip_p(np.ones(8)) == 2 / 2**8
    assert stats.sign_flip_p(np.ones(1)) == 1


def test_the_sign_flip_test_counts_ties():
    draw = np.random.default_rng(8)
    for _ in range(50):
        hits = draw.integers(0, 20, (2, 8))  # of 359
        flips = np.array(list(itertools.product((1, -1), repeat=8))) * (hits[0] - hits[1])
        share = np.mean(np.abs(flips.sum(1)) >= abs((hits[0] - hits[1]).sum()))
        assert stats.sign_flip_p(hits[0] / 359 - hits[1] / 359) == pytest.approx(share)


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_a_comparison_has_the_numbers_of_its_pairs():
    arm = {0: 1.0, 1: 1.2, 2: 0.9, 3: 1.1, 4: math.nan, 6: 5.0}
    base = {0: 1.1, 1: 1.25, 2: 1.1, 3: 1.1, 4: 1.0, 5: 7.0}
    (found,) = compare({"base": base, "arm": arm}, "base", 0.01, False, 8)
    differences = np.array([-0.1, -0.05, -0.2, 0.0])
    assert found.seeds == (0, 1, 2, 3)
    assert found.difference == pytest.approx(differences.mean())
    assert found.d_z == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert found.superiority == 3.5 / 4
    assert found.diverged == (1, 0)
    assert found.correlation == pytest.approx(np.corrcoef(found.values, found.baseline)[0, 1])
    assert found.welch_p == pytest.approx(scipy_stats.ttest_ind(found.values, found.baseline, equal_var=False).pvalue)
    assert found.t_interval == pytest.approx(
        tuple(scipy_stats.ttest_rel(found.values, found.baseline).confidence_interval())
    )
    assert found.verdict == "inconclusive"  # four seeds, and eight are wanted
    assert found.barred  # it is ahead, and diverged more often, which no seed undoes
    assert found.further_seeds is None
    assert compare({"base": arm, "arm": base}, "base", 0.01, False, 8)[0].barred  # so is the mirror image


def test_an_arm_that_diverges_is_not_better():
    arm = {seed: 1.0 + seed % 3 / 10 for seed in range(10)} | {10: math.inf}
    base = {seed: 2.0 + seed % 2 / 10 for seed in range(11)}
    (found,) = compare({"base": base, "arm": arm}, "base", 0.01, False, 8)
    assert (found.diverged, found.verdict, found.barred) == ((1, 0), "inconclusive", True)
    (found,) = compare({"base": arm, "arm": base}, "base", 0.01, False, 8)
    assert (found.diverged, found.verdict, found.barred) == ((0, 1), "inconclusive", True)


def test_two_pairs_that_finished_are_not_enough_for_equivalence():
    base = {seed: 3.0 if seed < 2 else math.nan for seed in range(8)}
    arm = {seed: value + 1e-4 * (-1) ** seed for seed, value in base.items()}
    (found,) = compare({"base": base, "arm": arm}, "base", 0.005, False, 8)
    assert (found.pairs, len(found.seeds), found.verdict) == (8, 2, "inconclusive")
    assert found.p_equivalence < 0.05


def test_a_run_that_diverged_is_worse_than_any_that_did_not():
    arm, base = {seed: 1.0 + seed % 3 / 100 for seed in range(10)}, {seed: 1.0 + seed % 4 / 100 for seed in range(10)}
    before = compare({"base": base, "arm": arm}, "base", 1e-6, False, 8)[0]
    assert before.verdict == "inconclusive"
    for lost, expected in ((1, "inconclusive"), (7, "worse"), (9, "worse"), (10, "worse")):
        (found,) = compare({"base": base, "arm": arm | dict.fromkeys(range(lost), math.nan)}, "base", 1e-6, False, 10)
        assert (found.verdict, found.diverged) == (expected, (lost, 0))
        (found,) = compare({"base": arm | dict.fromkeys(range(lost), math.nan), "arm": base}, "base", 1e-6, False, 10)
        assert found.verdict == {"worse": "better"}.get(expected, expected)


@pytest.mark.parametrize(
    ("mean", "smallest_effect"),
    [(0.8, 0.1), (0.8, 1.1), (0.3, 0.75), (0.0, 0.75)],  # where a difference is found, and where equivalence is
)
def test_as_many_further_seeds_settle_it_as_promised(mean, smallest_effect):
    draw = np.random.default_rng(4)
    seen = draw.normal(0, 1, 6)
    seen = (seen - seen.mean()) / seen.std(ddof=1) + mean  # standard deviation 1
    seeds = 6 + stats.further_seeds(seen, smallest_effect, 2)

    def settled(seeds, studies=400):
        verdicts = []
        for _ in range(studies):
            differences = draw.normal(mean, 1, seeds)
            p = scipy_stats.ttest_1samp(differences, 0).pvalue if seeds > 12 else stats.sign_flip_p(differences)
            equivalence = stats.equivalence_p(differences, smallest_effect)
            verdicts.append(stats.verdict(differences, p, equivalence, enough=True, diverged=(0, 0)))
        return 1 - verdicts.count("inconclusive") / studies

    slack = 3 * math.sqrt(0.8 * 0.2 / 400)
    assert settled(seeds) >= 0.8 - slack
    assert settled(seeds // 2) < 0.8  # and not many more than are needed
    assert stats.further_seeds(seen - mean, 1e-9, 2) is None


def test_more_seeds_find_smaller_effects_and_more_arms_larger_ones():
    effects = [stats.minimum_detectable_effect(n) for n in (4, 8, 16, 32)]
    assert effects == sorted(effects, reverse=True)
    assert effects[1] == pytest.approx(1.16, abs=0.02)  # of tables of the power of the t test, n = 8
    assert stats.minimum_detectable_effect(8, arms=3) > effects[1]


def test_interquartile_mean():
    tasks = [np.array([0.0, 1, 2, 3]), np.array([2.0, 4, 5, 90])]
    mean, low, high = stats.interquartile_mean(tasks, resamples=500)
    assert mean == (2 + 2 + 3 + 4) / 4  # of 0 1 | 2 2 3 4 | 5 90
    assert low < mean < high


@pytest.mark.parametrize(("tasks", "seeds"), [(2, 4), (3, 8)])
def test_the_interval_of_an_interquartile_mean_covers_as_promised(tasks, seeds):
    draw, studies = np.random.default_rng(7), 600
    covered = 0
    for _ in range(studies):
        _, low, high = stats.interquartile_mean([draw.normal(0, 1, seeds) for _ in range(tasks)], resamples=400)
        covered += low <= 0 <= high
    slack = 3 * math.sqrt(0.05 * 0.95 / studies) + 0.01
    assert 0.95 - slack <= covered / studies <= 0.95 + slack


def test_the_expected_best_of_some_tries():
    values = [1.0, 4.0, 2.0]
    every = [max(pair) for pair in itertools.product(values, repeat=2)]
    assert stats.expected_best_of(values, 2, True) == pytest.approx(np.mean(every))
    assert stats.expected_best_of(values, 1, False) == pytest.approx(np.mean(values))
    lows = [min(triple) for triple in itertools.product(values, repeat=3)]
    assert stats.expected_best_of(values, 3, False) == pytest.approx(np.mean(lows))


def test_a_baseline_that_is_no_arm():
    with pytest.raises(ValueError, match="baseline 'gelu' is no arm; the arms are a, b"):
        compare({"a": {}, "b": {}}, "gelu", 0.1, False, 8)


def test_arms_with_nothing_to_compare_are_judged_by_what_diverged():
    fine, lost = {seed: 1.0 + seed / 9 for seed in range(8)}, dict.fromkeys(range(8), math.nan)
    mixed = {**lost, 0: 1.0}
    found = {
        c.arm: c for c in compare({"base": fine, "lost": lost, "mixed": mixed, "good": fine}, "base", 0.1, False, 8)
    }
    assert {arm: c.verdict for arm, c in found.items()} == {
        "lost": "worse", "mixed": "worse", "good": "equivalent",
    }  # fmt: skip
    assert math.isnan(found["lost"].difference)
    assert found["lost"].further_seeds is None
    assert (found["good"].d_z, found["good"].p_holm) == (0, 1)
    (better,) = compare({"base": lost, "arm": fine}, "base", 0.1, False, 8)
    assert better.verdict == "better"
    (few,) = compare({"base": fine, "arm": lost}, "base", 0.1, False, 9)
    assert few.verdict == "inconclusive"


@pytest.mark.parametrize(("seeds", "alpha"), [(8, 0.05), (8, 0.0125), (10, 0.01), (14, 0.01)])
def test_the_power_of_the_sign_flip_test(seeds, alpha):
    draw, effect = np.random.default_rng(6), 1.4
    rejected = np.mean([stats.sign_flip_p(draw.normal(effect, 1, seeds)) <= alpha for _ in range(300)])
    promised = stats.power(seeds, effect, alpha)
    # both are shares, of 300 and of 2,000 draws; from 13 seeds on it is Student's t test's
    slack = 3 * math.sqrt(promised * (1 - promised) * (1 / 300 + 1 / 2000))
    assert rejected == pytest.approx(promised, abs=slack + (0.02 if seeds > 12 else 0))


def test_where_the_sign_flip_test_cannot_reject():
    assert stats.power(8, 100.0, 0.05 / 7) == 0  # its smallest p is 2 / 2^8
    assert stats.minimum_detectable_effect(8, 7) == math.inf
    assert stats.minimum_detectable_effect(8, 4) < 2
