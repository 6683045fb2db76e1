"""A task that trains in no time."""

import numpy as np
import torch
from torch import nn

from hf_gem.training.loss import IGNORE, Output
from hf_gem.training.task import Task

CLASSES, WIDTH, LENGTH = 5, 4, 6


class Sequences:
    """Sequences with a different number of targets in each, so that a mean of means is not the mean."""

    def __init__(self, count, seed=0):
        draw = np.random.default_rng(seed)
        self.x = torch.from_numpy(draw.normal(size=(count, LENGTH, WIDTH))).float()
        self.labels = torch.from_numpy(draw.integers(CLASSES, size=(count, LENGTH)))
        for i in range(count):
            self.labels[i, : i % LENGTH] = IGNORE
        self.asked = []
        self.draws = []

    def __len__(self):
        return len(self.x)

    def batch(self, indices, draws=None):
        self.asked.extend(indices.tolist())
        self.draws.extend([] if draws is None else draws.tolist())
        return {"x": self.x[indices], "labels": self.labels[indices]}


class Objective(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model
        self.dropout = nn.Dropout(0.2)
        self.steps = 0

    def forward(self, x, labels):
        self.steps += self.training
        logits = self.model(self.dropout(x))
        return Output(nn.functional.cross_entropy(logits.mT, labels, ignore_index=IGNORE, reduction="sum"))


def make_task(cls=Objective):
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, CLASSES)
    return Task("test", "tiny", model, cls(model), Sequences(20), Sequences(7, seed=1), {"hash": "d"}, LENGTH)
