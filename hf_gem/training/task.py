"""What is trained on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn


class Samples(Protocol):
    """Data by index. Labels equal to `IGNORE` are not targets."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """The keyword arguments of the objective for some samples, `labels` among them.

        Args:
            indices: Which samples.
            draws: In training, the number of each in the order of the whole run: what is random about a sample, masks
                or augmentation, is a function of it and of a seed. None in evaluation, which is always the same; there,
                `units` may be among the results, in the shape of `labels`: the number of the document or image that
                each target belongs to.
        """
        ...


@dataclass
class Task:
    """What is trained on what.

    Attributes:
        name: The recipe, as it appears in the record.
        preset: The preset, likewise.
        model: The model of transformers that is trained; at the end, all of its weights are here.
        objective: Of `loss`, with `model` as its attribute.
        train: Training samples.
        validation: Validation samples, all of which are evaluated.
        data: What the record says of the data; its `hash` identifies it.
        test: Samples to evaluate once, at the end; None without a test.
        units_per_sample: How much of what throughput counts is in a sample: tokens, 1 image, or 1 point.
        unit: What that is called.
        flops_per_unit: Training FLOPs for one, for the share of peak reported as MFU.
        metrics: Of `evaluate.METRICS`, computed beside the loss.
        facts: What else the record says, as JSON.
        lr_ratios: Parts of the model whose learning rate is a multiple of the others'.
        identity: What has to be equal, besides config and data, for a checkpoint to be continued; as JSON.
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
