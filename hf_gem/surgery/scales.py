"""The scale of what the activations of a model are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..fit import Histogram
from .calibrate import record_inputs
from .slots import Slot


@dataclass(frozen=True)
class Scales:
    """Root mean squares of what activations are given; NaN where a value of it was NaN or infinite.

    Attributes:
        rms: Over all of them: the root of the mean square of all values, so that an activation counts by their number.
        layers: Path -> that of one activation, where it ran; those that share a module have one for all.
    """

    rms: float
    layers: dict[str, float]


def input_scales(model: nn.Module, slots: Mapping[str, Slot], batches: Iterable[Any]) -> Scales:
    """Runs batches and measures, without gradients, dropout or a trace on the model.

    Batch normalisation takes the statistics of the batch, as in training: those that a new model has been running are
    still 0 and 1.

    Args:
        model: What takes the batches; it holds the slots.
        slots: Path -> place of an activation.
        batches: As `convert` takes them.

    Raises:
        ValueError: the model does not run on a batch.
    """
    recorders = record_inputs(model, slots, batches, batch_statistics=True)
    ran = {path: recorder for path, recorder in recorders.items() if recorder.histogram.counts.any()}
    distinct = {id(recorder): recorder.histogram for recorder in ran.values()}
    pooled = sum(distinct.values(), Histogram())
    return Scales(pooled.rms, {path: recorder.histogram.rms for path, recorder in ran.items()})
