"""The solutions solve their equations, and the residuals are those of the equations."""

import itertools
import math

import pytest
import torch
from transformers.activations import ACT2FN

from hf_gem.training.pde import PROBLEMS

EPS = torch.finfo(torch.float64).eps
VISCOSITY = 0.01 / math.pi
EACH = pytest.mark.parametrize("name", PROBLEMS)
WAVES = {"poisson": (1, 1, 0), "helmholtz": (1, 4, 1)}


def inside(problem, count=200):
    lower, upper = torch.tensor(problem.lower).double(), torch.tensor(problem.upper).double()
    return (lower + torch.rand(count, 2, dtype=torch.float64) * (upper - lower)).requires_grad_()


def burgers(x, t):
    return PROBLEMS["burgers"].exact(torch.stack(torch.broadcast_tensors(x, t), -1).reshape(-1, 2))


@EACH
def test_the_solution_solves_the_equation(name):
    problem = PROBLEMS[name]
    points = inside(problem)
    values = problem.exact(points)
    second = torch.autograd.grad(values.sum(), points, create_graph=True)[0]
    size = max(torch.autograd.grad(part.sum(), points, retain_graph=True)[0].abs().max() for part in second.T)
    # a hundred nodes, each with some roundings, in the largest of the terms that cancel
    assert problem.residual(values, points).abs().max() <= 1000 * EPS * size


@EACH
def test_the_solution_has_the_given_values_on_the_sides(name):
    problem = PROBLEMS[name]
    for axis, place in problem.sides:
        points = inside(problem).detach()
        points[:, axis] = place
        torch.testing.assert_close(problem.exact(points), problem.given(points), rtol=0, atol=100 * EPS)


@pytest.mark.parametrize("name", WAVES)
def test_the_residual_of_another_wave(name):
    """Of u* + c x^2 y it is -2 c y - k^2 c x^2 y."""
    a, b, k = WAVES[name]
    problem = PROBLEMS[name]
    points = inside(problem)
    x, y = points.T
    torch.testing.assert_close(problem.exact(points), torch.sin(a * math.pi * x) * torch.sin(b * math.pi * y))
    found = problem.residual(problem.exact(points) + 0.5 * x**2 * y, points)
    torch.testing.assert_close(found, -y - 0.5 * k**2 * x**2 * y, rtol=0, atol=1000 * EPS)


def test_the_residual_of_another_flow():
    """Of u = x^2 t it is x^2 + 2 x^3 t^2 - 2 nu t."""
    points = inside(PROBLEMS["burgers"])
    x, t = points.T
    found = PROBLEMS["burgers"].residual(x**2 * t, points)
    torch.testing.assert_close(found, x**2 + 2 * x**3 * t**2 - 2 * VISCOSITY * t, rtol=0, atol=10 * EPS)


@EACH
@pytest.mark.parametrize("act", ["relu", "linear"])
def test_a_field_of_planes_has_no_second_derivatives(name, act):
    problem = PROBLEMS[name]
    points = inside(problem)
    values = ACT2FN[act](points @ torch.randn(2, 5, dtype=torch.float64, requires_grad=True)).sum(-1)
    found = problem.residual(values, points)
    if name == "burgers":
        first = torch.autograd.grad(values.sum(), points, retain_graph=True)[0]
        expected = first[:, 1] + values * first[:, 0]
    else:
        a, b, k = WAVES[name]
        expected = -(k**2) * values - ((a**2 + b**2) * math.pi**2 - k**2) * problem.exact(points)
    torch.testing.assert_close(found, expected)


def test_burgers_by_finite_differences():
    """Their error falls with the square of the step, so the equation holds where it goes to."""
    x, t = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None], torch.linspace(0.1, 0.9, 9, dtype=torch.float64)

    def residual(h):
        u, left, right = burgers(x, t), burgers(x - h, t), burgers(x + h, t)
        in_time = (burgers(x, t + h) - burgers(x, t - h)) / (2 * h)
        found = in_time + u * (right - left) / (2 * h) - VISCOSITY * (right - 2 * u + left) / h**2
        return found.abs().max().item()

    errors = [residual(2.0**-k) for k in (10, 11, 12, 13)]
    ratios = [before / after for before, after in itertools.pairwise(errors)]
    assert ratios == pytest.approx([4] * 3, rel=0.1)


def test_burgers_by_another_quadrature():
    """The trapezoidal rule on 8,001 nodes, which converges for analytic functions that decay."""
    x, t = torch.linspace(-1, 1, 101, dtype=torch.float64), torch.linspace(0, 1, 11, dtype=torch.float64)
    nodes = torch.linspace(-13, 13, 8001, dtype=torch.float64)
    points = torch.cartesian_prod(x, t)
    y = math.pi * (points[:, :1] - torch.sqrt(4 * VISCOSITY * points[:, 1:]) * nodes)
    weights = torch.exp(-(nodes**2) - (y.cos() + 1) / (2 * math.pi * VISCOSITY))
    expected = -(weights * y.sin()).sum(-1) / weights.sum(-1)
    # the exponents, up to a hundred, have absolute errors of as many roundings
    torch.testing.assert_close(PROBLEMS["burgers"].exact(points), expected, rtol=0, atol=100 * EPS)


def test_burgers_is_odd_and_starts_as_a_sine():
    x, t = torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None], torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(burgers(-x, t), -burgers(x, t), rtol=0, atol=100 * EPS)
    start = torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(burgers(x, start), -torch.sin(math.pi * x[:, 0]), rtol=0, atol=10 * EPS)


def test_the_front_of_burgers_is_as_steep_as_published():
    """152.00516 at t = 1.6037 / pi, where it is steepest: Basdevant et al. 1986."""
    times = torch.tensor([1.58, 1.6037, 1.63], dtype=torch.float64) / math.pi
    points = torch.stack([torch.zeros(3, dtype=torch.float64), times], -1).requires_grad_()
    slopes = torch.autograd.grad(PROBLEMS["burgers"].exact(points).sum(), points)[0][:, 0]
    assert slopes[1].item() == pytest.approx(-152.00516, abs=1e-5)
    assert slopes.argmin() == 1


def test_float32_points_have_float32_values():
    points = inside(PROBLEMS["burgers"]).detach()
    found = PROBLEMS["burgers"].exact(points.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, PROBLEMS["burgers"].exact(points.float().double()).float())
