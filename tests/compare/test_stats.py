"""The statistics against simulated studies whose truth is known, and against what can be counted by hand."""

import math

import numpy as np
import pytest

from hf_gem.compare import stats
from hf_gem.compare.estimates import over_seeds
from hf_gem.compare.power import further_seeds
from hf_gem.compare.stats import compare
from hf_gem.compare.two_way import components
from tests.compare.simulated import STUDIES, crossed, rate_bound, simulate

scipy_stats = pytest.importorskip("scipy.stats", reason="verdicts are made by it")


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


def test_a_baseline_that_is_no_arm():
    with pytest.raises(ValueError, match="the baseline must be one of the arms a, b, got 'gelu'"):
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


SEEDS, DOCUMENTS, ALL = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.4, 0.4, 0.2)  # what varies


@STUDIES
@pytest.mark.parametrize(
    ("seeds", "groups", "shares", "uneven", "arms"),
    [(8, 40, SEEDS, False, 1), (8, 40, DOCUMENTS, True, 1), (8, 350, ALL, False, 1), (12, 40, ALL, True, 3)],
)
def test_false_positives_are_as_rare_with_documents(quick, seeds, groups, shares, uneven, arms, studies):
    draw, wrong, on_these = np.random.default_rng(0), 0, 0
    for _ in range(studies):
        outcomes, parts = crossed(seeds, groups, shares, draw, uneven=uneven, arms=arms)
        found = compare(outcomes, "base", 1e-6, False, 8, parts)
        wrong += any(c.verdict in ("better", "worse") for c in found)
        on_these += found[0].p < 0.05
    assert 0 < wrong / studies <= rate_bound(0.05, studies)
    if shares is DOCUMENTS:
        assert on_these == studies  # seeds alone show what is true of these documents


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("shares", [SEEDS, DOCUMENTS, ALL, (0.5, 0.0, 0.5), (0.0, 0.5, 0.5)])
@pytest.mark.parametrize(("seeds", "groups"), [(8, 40), (8, 350), (16, 40), (16, 350), (20, 40), (20, 350)])
def test_intervals_cover_seeds_and_documents(seeds, groups, shares, uneven):
    draw, studies, covered = np.random.default_rng(1), 2000, 0
    for _ in range(studies):
        _, parts = crossed(seeds, groups, shares, draw, uneven=uneven)
        sums = np.array([parts["arm0"][seed][0] - parts["base"][seed][0] for seed in range(seeds)])
        low, high = components(sums, parts["base"][0][1]).estimate.interval()
        covered += low <= 0 <= high
    assert 0.95 - 3 * math.sqrt(0.05 * 0.95 / studies) <= covered / studies < 0.995


@STUDIES
def test_equivalence_is_not_claimed_at_its_edge_with_documents(quick, studies):
    draw, claims = np.random.default_rng(2), 0
    for _ in range(studies):
        outcomes, parts = crossed(8, 40, ALL, draw, difference=0.04)
        claims += compare(outcomes, "base", 0.04, False, 8, parts)[0].verdict == "equivalent"
    assert 0 < claims / studies <= rate_bound(0.05, studies)


@STUDIES
def test_adjusted_intervals_cover_together(quick, studies):
    draw, missed, alone = np.random.default_rng(3), 0, 0
    for _ in range(studies):
        outcomes, parts = crossed(8, 40, ALL, draw, arms=4)
        found = compare(outcomes, "base", 1e-6, False, 8, parts)
        missed += not all(c.adjusted_interval[0] <= 0 <= c.adjusted_interval[1] for c in found)
        alone += not all(c.interval[0] <= 0 <= c.interval[1] for c in found)
    assert missed / studies <= rate_bound(0.05, studies) < alone / studies


def test_a_comparison_with_documents_has_their_interval_and_p():
    outcomes, parts = crossed(8, 40, ALL, np.random.default_rng(4), difference=-0.05, uneven=True)
    (found,) = compare(outcomes, "base", 0.005, False, 8, parts)
    (without,) = compare(outcomes, "base", 0.005, False, 8)
    sums = np.array([parts["arm0"][seed][0] - parts["base"][seed][0] for seed in range(8)])
    estimate = components(sums, parts["base"][0][1]).estimate
    assert found.components.estimate == estimate
    assert (found.interval, found.adjusted_interval) == (estimate.interval(), estimate.interval())
    assert found.p_two_way == pytest.approx(estimate.p())
    assert found.p_equivalence == found.p_equivalence_holm == estimate.p_equivalence(0.005)
    assert found.difference == pytest.approx(estimate.mean)
    for same in ("p", "t_interval", "difference", "d_z", "welch_p", "superiority", "correlation"):
        assert getattr(found, same) == getattr(without, same)
    assert found.verdict == "better"
    assert found.p_holm == max(found.p, found.p_two_way)
    assert without.p_holm == without.p
    assert math.isnan(without.p_two_way)
    assert without.components is None
    assert without.interval == stats.bca_interval(np.subtract(without.values, without.baseline))
    (mirrored,) = compare(outcomes, "arm0", 0.005, False, 8, parts)
    assert (mirrored.verdict, mirrored.p_two_way) == ("worse", pytest.approx(found.p_two_way))
    assert mirrored.interval == pytest.approx((-found.interval[1], -found.interval[0]))
    assert compare(outcomes, "base", 0.005, True, 8, parts)[0].verdict == "worse"


def test_what_holds_on_these_documents_alone_is_not_better():
    """Two documents of forty make the difference: all seeds agree, and other documents might not."""
    outcomes, parts = crossed(8, 40, SEEDS, np.random.default_rng(5))
    for seed, (sums, counts) in parts["arm0"].items():
        sums[:2] -= 2 * counts[:2]
        outcomes["arm0"][seed] = sums.sum() / counts.sum()
    (found,) = compare(outcomes, "base", 1e-6, False, 8, parts)
    assert found.p == 2 / 2**8
    assert found.verdict == "inconclusive"
    assert found.components.limited_by == "groups"
    assert found.further_seeds is None  # for no seeds settle it
    assert compare(outcomes, "base", 1e-6, False, 8)[0].verdict == "better"


def test_how_many_seeds_would_settle_what_is_open():
    outcomes, parts = crossed(8, 40, ALL, np.random.default_rng(12))
    (found,) = compare(outcomes, "base", 0.01, False, 8)
    assert (found.verdict, found.barred) == ("inconclusive", False)
    differences = np.subtract(found.values, found.baseline)
    assert found.further_seeds == further_seeds(differences, 0.01, 8, 1, 0.0) == 24
    assert compare(outcomes, "base", 0.01, False, 8, parts)[0].further_seeds is None  # other documents would
    outcomes, _ = crossed(8, 40, ALL, np.random.default_rng(11))
    (found,) = compare(outcomes, "base", 0.01, False, 8)
    assert (found.verdict, found.barred, found.further_seeds) == ("better", False, None)


def test_intervals_of_several_arms_are_wider_and_of_one_arm_they_are_its_own():
    outcomes, _ = crossed(8, 40, ALL, np.random.default_rng(13), arms=2)
    for found in compare(outcomes, "base", 0.01, False, 8):
        seeds = over_seeds(np.subtract(found.values, found.baseline))
        assert found.adjusted_interval == seeds.interval(0.05 / 2)
        (alone,) = compare({arm: outcomes[arm] for arm in ("base", found.arm)}, "base", 0.01, False, 8)
        assert alone.adjusted_interval == alone.interval == found.interval


@pytest.mark.filterwarnings("error:invalid value", "ignore:Precision loss")
def test_outcomes_that_do_not_vary_have_no_correlation():
    varies, constant = {0: 1.0, 1: 1.2, 2: 0.9, 3: 1.1}, dict.fromkeys(range(4), 1.0)
    for base, arm in ((varies, constant), (constant, varies)):
        (found,) = compare({"base": base, "arm": arm}, "base", 0.01, False, 8)
        assert math.isnan(found.correlation)


@pytest.mark.parametrize(
    ("gain", "p", "p_equivalence", "diverged", "expected"),
    [
        (1.0, 0.049, 1.0, (0, 0), "better"),
        (1.0, 0.05, 1.0, (0, 0), "inconclusive"),
        (1.0, 0.049, 1.0, (0, 1), "better"),
        (1.0, 0.049, 1.0, (1, 0), "inconclusive"),
        (-1.0, 0.049, 1.0, (0, 0), "worse"),
        (-1.0, 0.05, 1.0, (0, 0), "inconclusive"),
        (-1.0, 0.049, 1.0, (1, 0), "worse"),
        (-1.0, 0.049, 1.0, (0, 1), "inconclusive"),
        (0.0, 0.049, 1.0, (0, 0), "inconclusive"),
        (1.0, 0.049, 0.049, (1, 1), "equivalent"),
        (1.0, 1.0, 0.05, (0, 0), "inconclusive"),
        (1.0, 1.0, 0.049, (0, 1), "inconclusive"),
        (1.0, 1.0, 0.049, (1, 0), "inconclusive"),
    ],
)
def test_the_word_for_an_arm(gain, p, p_equivalence, diverged, expected):
    gains = np.full(8, gain)
    assert stats.verdict(gains, p, p_equivalence, enough=True, diverged=diverged) == expected
    assert stats.verdict(gains, p, p_equivalence, enough=False, diverged=diverged) == "inconclusive"


@pytest.mark.parametrize(("seeds", "groups"), [(2, 2), (1, 4), (4, 1)])
def test_two_seeds_and_two_documents_are_the_least_that_have_components(seeds, groups):
    outcomes, parts = crossed(seeds, groups, ALL, np.random.default_rng(1))
    (found,) = compare(outcomes, "base", 0.01, False, 2, parts)
    assert (found.components is not None) == (seeds == groups == 2) == math.isfinite(found.p_two_way)
    assert found.verdict == "inconclusive"


def test_runs_that_diverged_count_with_documents():
    outcomes, parts = crossed(8, 40, ALL, np.random.default_rng(6))
    before = compare(outcomes, "base", 1e-6, False, 8, parts)[0]
    assert before.verdict == "inconclusive"
    for lost, expected in ((1, "inconclusive"), (7, "worse"), (8, "worse")):
        gone = {"base": outcomes["base"], "arm": outcomes["arm0"] | dict.fromkeys(range(lost), math.nan)}
        there = {"base": parts["base"], "arm": {s: part for s, part in parts["arm0"].items() if s >= lost}}
        (found,) = compare(gone, "base", 1e-6, False, 8, there)
        assert (found.verdict, found.diverged) == (expected, (lost, 0))
        assert (found.components is None) == (lost >= 7)  # one pair has no interval


def test_parts_that_are_not_there_leave_all_as_it_was():
    outcomes, parts = crossed(8, 40, ALL, np.random.default_rng(7), arms=2)
    without = compare(outcomes, "base", 0.005, False, 8)
    del parts["arm1"][3]
    first, second = compare(outcomes, "base", 0.005, False, 8, parts)
    assert first.components is not None
    assert second.components is None
    assert second.interval == without[1].interval
    one = {arm: {seed: part.sum(1, keepdims=True) for seed, part in of.items()} for arm, of in parts.items()}
    assert compare(outcomes, "base", 0.005, False, 8, one)[0].interval == without[0].interval  # one group


def test_parts_of_other_samples_or_another_metric():
    outcomes, parts = crossed(8, 4, ALL, np.random.default_rng(8))
    parts["arm0"][2] = parts["arm0"][2] * [[1.1], [1.1]]
    with pytest.raises(ValueError, match="the seeds 0 and 2 of arm0 were evaluated on different samples"):
        compare(outcomes, "base", 0.005, False, 8, parts)
    parts["arm0"] = {seed: 2 * part for seed, part in parts["base"].items()}
    outcomes["arm0"] = outcomes["base"]
    with pytest.raises(ValueError, match="arm0 and base were evaluated on different samples: their counts by group"):
        compare(outcomes, "base", 0.005, False, 8, parts)
    outcomes["arm0"] = {seed: value + 0.01 for seed, value in outcomes["arm0"].items()}
    with pytest.raises(ValueError, match=r"the groups of arm0, seed 0, give \d\.\d+, but its outcome is \d\.\d+"):
        compare(outcomes, "base", 0.005, False, 8, parts)


def test_equivalence_is_adjusted_for_the_number_of_arms():
    draw = np.random.default_rng(9)
    noise = draw.normal(0, 1, 8)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    # each is equivalent at 0.03 alone, and the two of them together are not
    edge = scipy_stats.t.isf(0.03, 7) / math.sqrt(8)
    base = dict.fromkeys(range(8), 0.0)
    arm = dict(enumerate(noise))
    (alone,) = compare({"base": base, "arm": arm}, "base", edge, False, 8)
    assert (alone.verdict, alone.p_equivalence_holm) == ("equivalent", pytest.approx(0.03))
    both = compare({"base": base, "arm": arm, "other": arm}, "base", edge, False, 8)
    assert [(c.verdict, c.p_equivalence_holm) for c in both] == [("inconclusive", pytest.approx(0.06))] * 2
    assert [c.p_equivalence for c in both] == pytest.approx([0.03, 0.03])
