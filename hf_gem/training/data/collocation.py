"""Points of a differential equation: random ones to train on, and a grid to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..pde import Problem
from ..record import hash_tensors
from ..task import Samples
from .order import four_uniforms

_PASS = 1 << 16  # samples in a pass of the endless order; no point repeats


class CollocationPoints:
    """Uniform random points: each draw gives one in the box and one on a side where the solution is given.

    The points depend only on seed and draw. All sides on which the solution is given get the same share of points,
    regardless of their length.

    Args:
        problem: The problem with the box and its sides.
        seed: Seed of the points.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.lower, self.size = np.array(problem.lower), np.subtract(problem.upper, problem.lower)
        axes, places = zip(*problem.sides, strict=True)
        self.axes, self.places = np.array(axes), np.array(places)

    def __len__(self) -> int:
        return _PASS

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Returns `points` and `boundary`, both (batch, 2), and `labels` (batch,), the solution on the boundary."""
        numbers = four_uniforms((self.seed, 0), indices if draws is None else draws)
        boundary = self.lower + numbers[:, 2:3] * self.size
        side = (numbers[:, 3] * len(self.axes)).astype(np.int64)
        boundary[np.arange(len(side)), self.axes[side]] = self.places[side]
        return {
            "points": torch.from_numpy(self.lower + numbers[:, :2] * self.size).float(),
            "boundary": torch.from_numpy(boundary).float(),
            "labels": self.problem.given(torch.from_numpy(boundary)).float(),
        }


class GridPoints:
    """The evaluation grid of a problem, with the solution at its points.

    Args:
        problem: The problem.
    """

    def __init__(self, problem: Problem) -> None:
        ends = zip(problem.lower, problem.upper, problem.grid, strict=True)
        axes = [torch.linspace(*end, dtype=torch.float64) for end in ends]
        points = torch.cartesian_prod(*axes)
        self.points, self.labels = points.float(), problem.exact(points).float()

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Returns `points` (batch, 2) and `labels` (batch,), the solution at the points."""
        return {"points": self.points[indices], "labels": self.labels[indices]}


@dataclass
class PointData:
    """The points of a problem, ready for training.

    Attributes:
        train: Points at which the equation and its conditions must hold.
        validation: Points at which the model is compared with the solution.
        facts: Facts for the record: the number of evaluation points, and a SHA-256 of them and the solution there.
    """

    train: Samples
    validation: Samples
    facts: dict[str, Any]


def prepare_points(problem: Problem, seed: int) -> PointData:
    """Makes the points of a problem.

    Args:
        problem: The problem.
        seed: Seed of the training points.
    """
    grid = GridPoints(problem)
    digest = hash_tensors({"points": grid.points, "labels": grid.labels})
    return PointData(CollocationPoints(problem, seed), grid, {"hash": digest, "num_points": {"validation": len(grid)}})
