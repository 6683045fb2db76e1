"""The variance over seeds and documents, against sums that are written out, textbooks and simulation."""

import math

import numpy as np
import pytest

from hf_gem.compare.two_way import components
from tests.compare.simulated import STUDIES, lengths

scipy_stats = pytest.importorskip("scipy.stats", reason="verdicts are made by it")


def drawn(seeds, groups, draw, spreads=(1.0, 1.0, 1.0), uneven=False):
    """Sums of differences, (seeds, groups), and counts."""
    counts = lengths(groups, draw, uneven)
    of_seeds, of_groups, of_both = spreads
    values = draw.normal(0, of_seeds, (seeds, 1)) + draw.normal(0, of_groups, groups)
    return (values + draw.normal(0, of_both, (seeds, groups))) * counts, counts


def numbers(found):
    return [found.mean, found.seeds, found.groups, found.both, found.group_degrees]


def test_the_sums_written_out():
    sums, counts = drawn(5, 7, np.random.default_rng(0), uneven=True)
    found, (seeds, groups) = components(sums, counts), sums.shape
    total = sum(counts)
    share = [count / total for count in counts]
    value = [[sums[s, g] / counts[g] for g in range(groups)] for s in range(seeds)]
    of_seed = [sum(sums[s]) / total for s in range(seeds)]
    of_group = [sum(value[s][g] for s in range(seeds)) / seeds for g in range(groups)]
    mean = sum(of_seed) / seeds
    squares = sum(h**2 for h in share)
    weight = [h**2 / (1 - 2 * h + squares) for h in share]
    v_seeds = sum((x - mean) ** 2 for x in of_seed) / (seeds * (seeds - 1))
    v_groups = sum(weight[g] * (of_group[g] - mean) ** 2 for g in range(groups))
    v_both = sum(
        weight[g] * (value[s][g] - of_seed[s] - of_group[g] + mean) ** 2 for s in range(seeds) for g in range(groups)
    ) / (seeds * (seeds - 1))
    degrees = squares**2 / sum(
        weight[g] * weight[k] * ((g == k) - share[g] - share[k] + squares) ** 2
        for g in range(groups)
        for k in range(groups)
    )
    assert v_seeds > v_both < v_groups  # so that nothing is cut off at zero
    assert numbers(found) == pytest.approx([mean, v_seeds - v_both, v_groups - v_both, v_both, degrees])
    variance = v_seeds + v_groups - v_both
    assert found.estimate.error == pytest.approx(math.sqrt(variance))
    spread = v_seeds**2 / (seeds - 1) + v_groups**2 / degrees + v_both**2 / ((seeds - 1) * degrees)
    assert found.estimate.degrees == pytest.approx(variance**2 / spread)


def test_groups_of_one_size_have_the_mean_squares_of_textbooks():
    sums, counts = drawn(6, 9, np.random.default_rng(1))
    values, found = sums / counts, components(sums, counts)
    mean, rows, columns = values.mean(), values.mean(1), values.mean(0)
    of_rows = 9 * ((rows - mean) ** 2).sum() / 5
    of_columns = 6 * ((columns - mean) ** 2).sum() / 8
    of_rest = ((values - rows[:, None] - columns + mean) ** 2).sum() / (5 * 8)
    expected = [mean, (of_rows - of_rest) / 54, (of_columns - of_rest) / 54, of_rest / 54, 8]
    assert numbers(found) == pytest.approx(expected)


@pytest.mark.parametrize("uneven", [False, True])
@STUDIES
def test_the_parts_are_right_on_average(uneven, studies):
    draw, spreads = np.random.default_rng(2), (3.0, 3.0, 2.0)  # so that next to nothing is cut off at zero
    counts = lengths(30, draw, uneven)
    squares = np.sum((counts / counts.sum()) ** 2)
    parts = []
    for _ in range(studies):
        values = draw.normal(0, 3, (8, 1)) + draw.normal(0, 3, 30) + draw.normal(0, 2, (8, 30))
        found = components(values * counts, counts)
        parts.append((found.seeds + found.both, found.groups + found.both, found.both))
    rest = spreads[2] ** 2 * squares / 8
    expected = np.array([spreads[0] ** 2 / 8 + rest, spreads[1] ** 2 * squares + rest, rest])
    slack = 4 * np.std(parts, axis=0) / math.sqrt(studies)
    assert np.all(np.abs(np.mean(parts, axis=0) - expected) <= slack)


def test_where_one_of_the_two_varies_alone_it_is_the_t_test_over_that():
    draw = np.random.default_rng(3)
    counts = np.full(12, 40.0)
    seeds, groups = draw.normal(0.3, 1, 7), draw.normal(0.3, 1, 12)
    for values, one in ((np.repeat(seeds[:, None], 12, axis=1), seeds), (np.tile(groups, (7, 1)), groups)):
        estimate = components(values * counts, counts).estimate
        test = scipy_stats.ttest_1samp(one, 0)
        assert estimate.p() == pytest.approx(test.pvalue)
        assert estimate.interval() == pytest.approx(tuple(test.confidence_interval()))


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 7])
def test_the_interval_has_the_means_that_are_not_rejected(alpha):
    estimate = components(*drawn(8, 40, np.random.default_rng(4), uneven=True)).estimate
    for end, step in zip(estimate.interval(alpha), (-1e-6, 1e-6), strict=True):
        assert estimate.p(end) == pytest.approx(alpha)
        assert estimate.p(end + step) < alpha < estimate.p(end - step)
    low, high = estimate.interval(2 * alpha)
    assert estimate.p_equivalence(max(-low, high)) == pytest.approx(alpha)  # of one side


def test_order_unit_and_empty_groups_do_not_matter():
    draw = np.random.default_rng(5)
    sums, counts = drawn(8, 20, draw, uneven=True)
    found = components(sums, counts)
    rows, columns = draw.permutation(8), draw.permutation(20)
    assert numbers(components(sums[rows][:, columns], counts[columns])) == pytest.approx(numbers(found))
    empty = components(np.insert(sums, 3, 0, axis=1), np.insert(counts, 3, 0))
    assert numbers(empty) == pytest.approx(numbers(found))
    turned = components(-100 * sums, counts)
    assert turned.estimate.p() == pytest.approx(found.estimate.p())
    assert turned.variance == pytest.approx(1e4 * found.variance)
    moved = components(sums + 5 * counts, counts)
    assert numbers(moved) == pytest.approx([found.mean + 5, *numbers(found)[1:]])
    assert components(10 * sums, 10 * counts).estimate.p() == pytest.approx(found.estimate.p())
    even, ones = drawn(8, 20, draw)[0], np.ones(20)  # as images count
    assert numbers(components(even, ones)) == pytest.approx(numbers(components(10 * even, 10 * ones)))


def test_differences_that_are_all_equal():
    counts = np.array([10.0, 30, 20])
    estimate = components(np.outer(np.full(4, 0.5), counts), counts).estimate
    assert estimate.interval() == pytest.approx((0.5, 0.5))
    assert estimate.p() < 1e-9
    nothing = components(np.zeros((4, 3)), counts).estimate
    assert (nothing.p(), nothing.interval(), nothing.p_equivalence(0.1)) == (1.0, (0.0, 0.0), 0.0)


def test_few_long_documents_leave_few_degrees_of_freedom():
    even = components(*drawn(8, 40, np.random.default_rng(6)))
    assert even.group_degrees == pytest.approx(39)
    sums, counts = drawn(8, 40, np.random.default_rng(6))
    counts[0] *= 100
    assert components(sums, counts).group_degrees < 3


def test_what_other_numbers_of_seeds_and_documents_are_expected_to_give():
    draw, spreads = np.random.default_rng(7), (0.1, 1.0, 1.0)
    found = components(*drawn(8, 40, draw, spreads))
    assert found.limited_by == "groups"
    assert numbers(found.planned(8, 40)) == pytest.approx(numbers(found))
    more = found.planned(16, 40)
    assert (more.seeds, more.groups, more.both) == pytest.approx((found.seeds / 2, found.groups, found.both / 2))
    assert found.planned(8, 80).group_degrees == pytest.approx(2 * found.group_degrees)
    large = found.planned(8, 400_000)
    assert large.limited_by == "seeds"
    assert large.variance == pytest.approx(found.seeds, rel=0.01)
    seen = [components(*drawn(16, 160, draw, spreads)).variance for _ in range(200)]
    guesses = [components(*drawn(8, 40, draw, spreads)).planned(16, 160).variance for _ in range(200)]
    slack = 4 * math.hypot(np.std(seen), np.std(guesses)) / math.sqrt(200)
    assert np.mean(guesses) == pytest.approx(np.mean(seen), abs=slack)
