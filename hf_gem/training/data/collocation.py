"""Points of a problem: those at which its equation and its conditions are to hold, and a grid to evaluate on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..pde import Problem
from ..record import hash_tensors
from ..task import Samples
from .order import four_uniforms

_PASS = 1 << 16  # samples in a pass of the order, which has no end; no point comes twice


class CollocationPoints:
    """For each draw a point in the box and one where the solution is given, uniform, functions of seed and draw alone.

    Each side on which the solution is given gets the same share of points, whatever its length.

    Args:
        problem: Whose box and sides.
        seed: Of the points.
    """

    def __init__(self, problem: Problem, seed: int) -> None:
        self.problem, self.seed = problem, seed
        self.lower, self.size = np.array(problem.lower), np.subtract(problem.upper, problem.lower)
        axes, places = zip(*problem.sides, strict=True)
        self.axes, self.places = np.array(axes), np.array(places)

    def __len__(self) -> int:
        return _PASS

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """`points` and `boundary`, (batch, 2), and `labels`, the solution at the latter, (batch,)."""
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
    """The evaluation grid of a problem, and the solution there.

    Args:
        problem: Which.
    """

    def __init__(self, problem: Problem) -> None:
        ends = zip(problem.lower, problem.upper, problem.grid, strict=True)
        axes = [torch.linspace(*end, dtype=torch.float64) for end in ends]
        points = torch.cartesian_prod(*axes)
        self.points, self.labels = points.float(), problem.exact(points).float()

    def __len__(self) -> int:
        return len(self.points)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """`points`, (batch, 2), and `labels`, the solution there, (batch,)."""
        return {"points": self.points[indices], "labels": self.labels[indices]}


@dataclass
class PointData:
    """The points of a problem, ready for training.

    Attributes:
        train: Where equation and conditions are to hold.
        validation: Where the solution is compared.
        facts: For the record: the number of points that are evaluated, and a SHA-256 of these and the solution there.
    """

    train: Samples
    validation: Samples
    facts: dict[str, Any]


def prepare_points(problem: Problem, seed: int) -> PointData:
    """The points of a problem.

    Args:
        problem: Which.
        seed: Of those to train on.
    """
    grid = GridPoints(problem)
    digest = hash_tensors({"points": grid.points, "labels": grid.labels})
    return PointData(CollocationPoints(problem, seed), grid, {"hash": digest, "num_points": {"validation": len(grid)}})
