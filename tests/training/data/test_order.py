"""The sample order is a pure function of seed and step."""

import numpy as np
import pytest

from hf_gem.training.data.order import SampleOrder, four_uniforms


def test_every_pass_is_a_new_permutation():
    order = SampleOrder(10, seed=3)
    stream = np.concatenate([order.batch(step, 4) for step in range(10)])
    passes = stream.reshape(4, 10)
    assert all(sorted(p) == list(range(10)) for p in passes.tolist())
    assert len({tuple(p) for p in passes.tolist()}) == 4


def test_it_depends_on_nothing_but_seed_and_step():
    forward = [SampleOrder(1000, seed=0).batch(step, 7) for step in range(5)]
    order = SampleOrder(1000, seed=0)
    for step in (4, 0, 3):
        np.testing.assert_array_equal(order.batch(step, 7), forward[step])
    assert not np.array_equal(SampleOrder(1000, seed=1).batch(0, 7), forward[0])


def test_a_batch_may_be_longer_than_the_data():
    assert sorted(SampleOrder(3, seed=0).batch(0, 9)) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        SampleOrder(0, seed=0)


def test_four_uniforms_are_functions_of_key_and_counter():
    counters = np.arange(100, 1100)
    whole = four_uniforms((3, 1), counters)
    for part in (counters[5:9], counters[[7, 3, 4, 5, 900]], counters[::-1]):
        np.testing.assert_array_equal(four_uniforms((3, 1), part), whole[part - 100])
    for key in ((4, 1), (3, 2)):
        assert not (four_uniforms(key, counters) == whole).any()
    assert len(np.unique(whole)) == whole.size
    # five standard deviations of a mean of 1,000
    assert np.abs(whole.mean(0) - 0.5).max() < 5 * (12 * 1000) ** -0.5
