"""The task of a recipe: a model, an objective and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class Samples(Protocol):
    """Samples that are read by index. Labels equal to `IGNORE` are not targets."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """Returns the keyword arguments of the objective for some samples, including `labels`.

        Args:
            indices: Indices of the samples.
            draws: In training, the position of each sample in the order of the whole run. Masks and augmentation of a
                sample depend only on this number and a seed. None in evaluation, which is always the same. The result
                may then include `units`, in the shape of `labels`: the number of the document or image that each target
                belongs to.
        """
        ...


@dataclass
class Task:
    """A model, an objective, and the data to train and evaluate on.

    Attributes:
        name: Name of the recipe, for the record.
        preset: Name of the preset, for the record.
        model: The transformers model to train. At the end it holds all trained weights.
        objective: A module of `loss`, with `model` as an attribute.
        train: Training samples.
        validation: Validation samples. All of them are evaluated.
        data: Facts about the data for the record. Its `hash` identifies the data.
        test: Samples to evaluate once, at the end, or None.
        units_per_sample: Number of units in a sample: its tokens, or 1 for an image or point.
        unit: Name of the unit that throughput counts.
        flops_per_unit: Training FLOPs per unit, from which MFU is computed, or None.
        metrics: Names of `evaluate.METRICS` to compute in addition to the loss.
        facts: Further facts for the record, as JSON.
        lr_ratios: Parts of the model -> the multiple of the usual learning rate that they get.
        identity: Further values that must be equal for a checkpoint to be resumed, as JSON.
    """

    name: str
    preset: str
    model: nn.Module
    objective: nn.Module
    train: Samples
    validation: Samples
    data: dict[str, Any]
    units_per_sample: int
    unit: str = "tokens"
    flops_per_unit: float | None = None
    metrics: tuple[str, ...] = ("perplexity",)
    test: Samples | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    lr_ratios: dict[nn.Module, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
