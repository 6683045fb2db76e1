"""Partial differential equations in two variables whose solutions are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_VISCOSITY = 0.01 / math.pi
_NUM_NODES = 100  # nodes of the quadrature: more do not change the solution in float64


@dataclass(frozen=True)
class Problem:
    """A boundary value problem on a box.

    Attributes:
        statement: Equation, domain, conditions and solution, in Markdown.
        lower: Smallest coordinates of the box.
        upper: Largest coordinates of the box.
        sides: The sides on which the solution is given, each as the index of a coordinate and its value there.
        given: The solution on these sides, (batch, 2) -> (batch,).
        grid: Number of points of the evaluation grid along each coordinate, including both ends.
        exact: The solution at points, (batch, 2) -> (batch,).
        residual: The residual of the equation, (batch,), from the values of a field, (batch,), and the points they were
            computed from, which require a gradient.
    """

    statement: str
    lower: tuple[float, float]
    upper: tuple[float, float]
    sides: tuple[tuple[int, float], ...]
    given: Callable[[Tensor], Tensor]
    grid: tuple[int, int]
    exact: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor, Tensor], Tensor]


def _gradient(values: Tensor, points: Tensor) -> Tensor:
    """Differentiates each value by the coordinates of its point. The result is differentiable; zero without a graph."""
    return torch.autograd.grad(values.sum(), points, create_graph=True, materialize_grads=True)[0]


def _waves(statement: str, a: int, b: int, k: float) -> Problem:
    """Makes the problem -lap u - k^2 u = f on a square, with f chosen so that u = sin(a pi x) sin(b pi y)."""

    def exact(points: Tensor) -> Tensor:
        return torch.sin(a * math.pi * points[:, 0]) * torch.sin(b * math.pi * points[:, 1])

    def residual(values: Tensor, points: Tensor) -> Tensor:
        first = _gradient(values, points)
        laplacian = _gradient(first[:, 0], points)[:, 0] + _gradient(first[:, 1], points)[:, 1]
        source = ((a**2 + b**2) * math.pi**2 - k**2) * exact(points)
        return -laplacian - k**2 * values - source

    return Problem(
        statement,
        lower=(-1.0, -1.0),
        upper=(1.0, 1.0),
        sides=((0, -1.0), (0, 1.0), (1, -1.0), (1, 1.0)),
        given=lambda points: torch.zeros_like(points[:, 0]),
        grid=(101, 101),
        exact=exact,
        residual=residual,
    )


def _burgers(points: Tensor) -> Tensor:
    """Evaluates the formula of Cole and Hopf by Gauss-Hermite quadrature, always in float64.

    u is a weighted mean of -sin(pi y) over y = x - sqrt(4 nu t) z with weights exp(-z^2 - cos(pi y) / (2 pi nu)). The
    logarithms of the weights span a range of 100, so the mean is computed with a softmax. Source: Basdevant et al.,
    Computers & Fluids 14 (1986) 23-41.
    """
    nodes, weights = (torch.from_numpy(part).to(points.device) for part in np.polynomial.hermite.hermgauss(_NUM_NODES))
    x, t = points.double().split(1, dim=-1)
    y = math.pi * (x - torch.sqrt(4 * _VISCOSITY * t) * nodes)
    shares = torch.softmax(weights.log() - y.cos() / (2 * math.pi * _VISCOSITY), dim=-1)
    values: Tensor = -(shares * y.sin()).sum(-1).to(points.dtype)
    return values


def _burgers_residual(values: Tensor, points: Tensor) -> Tensor:
    first = _gradient(values, points)
    return first[:, 1] + values * first[:, 0] - _VISCOSITY * _gradient(first[:, 0], points)[:, 0]


PROBLEMS = {
    "poisson": _waves(
        "the Poisson equation `-lap u = 2 pi^2 u*` on [-1, 1]^2, `u = 0` on the boundary; the solution is "
        "`u* = sin(pi x) sin(pi y)`",
        a=1,
        b=1,
        k=0.0,
    ),
    # Wang, Teng and Perdikaris 2021 (arXiv 2001.04536), with the sign flipped.
    "helmholtz": _waves(
        "the Helmholtz equation `-lap u - u = (17 pi^2 - 1) u*` on [-1, 1]^2, `u = 0` on the boundary; the solution is "
        "`u* = sin(pi x) sin(4 pi y)`",
        a=1,
        b=4,
        k=1.0,
    ),
    # Raissi, Perdikaris and Karniadakis 2019 (arXiv 1711.10561).
    "burgers": Problem(
        "the viscous Burgers equation `u_t + u u_x = (0.01 / pi) u_xx` for x in [-1, 1] and t in [0, 1], "
        "`u(x, 0) = -sin(pi x)` and `u(-1, t) = u(1, t) = 0`; the solution is that of Cole and Hopf",
        lower=(-1.0, 0.0),
        upper=(1.0, 1.0),
        sides=((0, -1.0), (0, 1.0), (1, 0.0)),
        given=lambda points: -torch.sin(math.pi * points[:, 0]),
        grid=(256, 100),
        exact=_burgers,
        residual=_burgers_residual,
    ),
}
