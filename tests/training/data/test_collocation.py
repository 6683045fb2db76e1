"""Collocation points are functions of seed and draw, and uniform; the grid has the solution."""

import numpy as np
import pytest
import torch

from hf_gem.training.data.collocation import CollocationPoints, prepare_points
from hf_gem.training.pde import PROBLEMS

EACH = pytest.mark.parametrize("name", PROBLEMS)
DRAWS = np.arange(3000, 7000)


def batch(name="burgers", draws=DRAWS, seed=0, indices=None):
    return CollocationPoints(PROBLEMS[name], seed).batch(np.zeros_like(draws) if indices is None else indices, draws)


def test_a_point_depends_on_seed_and_draw_alone():
    whole = batch()
    for part in (slice(10, 20), [7, 3, 900, 901, 902, 2]):
        again = batch(draws=DRAWS[part], indices=DRAWS[part] + 5)
        assert all(torch.equal(again[key], whole[key][part]) for key in whole)
    for other in (batch(seed=1), batch(draws=DRAWS + len(DRAWS))):
        assert not any(torch.equal(other[key], whole[key]) for key in whole)
    assert len(np.unique(whole["points"].numpy(), axis=0)) == len(DRAWS)


@EACH
def test_points_are_uniform(name):
    problem, found = PROBLEMS[name], batch(name)
    lower, upper = torch.tensor(problem.lower), torch.tensor(problem.upper)
    shares = (found["points"] - lower) / (upper - lower)
    assert (shares >= 0).all()
    assert (shares <= 1).all()
    for axis in range(2):  # five standard deviations of counts in tenths
        counts = torch.histc(shares[:, axis], 10, 0, 1)
        assert (counts - len(DRAWS) / 10).abs().max() < 5 * (len(DRAWS) * 0.09) ** 0.5


@EACH
def test_boundary_points_are_where_the_solution_is_given(name):
    problem, found = PROBLEMS[name], batch(name)
    on = torch.stack([found["boundary"][:, axis] == place for axis, place in problem.sides])
    assert on.any(0).all()
    share = 1 / len(problem.sides)
    assert (on.sum(1) - len(DRAWS) * share).abs().max() < 5 * (len(DRAWS) * share * (1 - share)) ** 0.5
    expected = problem.exact(found["boundary"].double()).float()
    # the point was rounded after its label was computed
    torch.testing.assert_close(found["labels"], expected, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    assert found["labels"].dtype == torch.float32
    assert bool(found["labels"].any()) == (name == "burgers")


@EACH
def test_the_grid(name):
    problem = PROBLEMS[name]
    data = prepare_points(problem, seed=0)
    grid = data.validation.batch(np.arange(len(data.validation)))
    assert grid["points"].shape == (problem.grid[0] * problem.grid[1], 2)
    assert tuple(grid["points"][0].tolist()) == problem.lower
    assert tuple(grid["points"][-1].tolist()) == problem.upper
    torch.testing.assert_close(
        grid["labels"], problem.exact(grid["points"].double()).float(), rtol=0, atol=2e-5
    )  # a point is rounded by 6e-8 at most, and no solution is steeper than 152
    assert data.facts == {**prepare_points(problem, seed=1).facts, "num_points": {"validation": len(grid["labels"])}}


def test_problems_have_hashes_of_their_own():
    assert len({prepare_points(problem, 0).facts["hash"] for problem in PROBLEMS.values()}) == len(PROBLEMS)
