"""The scale of what the activations of a model are given, and the eps chosen by it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..family.names import GemSpec
from ..fit import MATCH_C, Histogram, match_eps
from .calibrate import Calibration, Scales, record_inputs
from .slots import Slot


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


def match(
    model: nn.Module, slots: Mapping[str, Slot], given: GemSpec, batches: Iterable[Any], per_layer: bool, c: float
) -> Calibration:
    """The members of a family whose gate is half open at c times the rms of what the activations are given.

    Args:
        model: The model.
        slots: Path -> place of an activation.
        given: The family and n.
        batches: As `convert` takes them.
        per_layer: Whether each activation goes by its own rms; those that did not run go by that of all.
        c: As for `match_eps`.

    Raises:
        ValueError: the model does not run on a batch, nothing was reached, or an rms is 0 or not finite.
    """
    scales = input_scales(model, slots, batches)
    if not scales.layers:
        raise ValueError("none of the activations ran on data=; give batches that reach them")
    members = {}
    for path in slots:
        rms = scales.layers.get(path, scales.rms) if per_layer else scales.rms
        members[path] = matched(given, rms, c, f"at {path}" if per_layer else "over all activations")
    return Calibration(members, scales=scales)


def matched(given: GemSpec, rms: float, c: float, where: str) -> GemSpec:
    """The member with the eps for an rms, which stands `where`, as errors say."""
    try:
        return GemSpec(given.family, given.n, match_eps(rms, given.n, c), given.learnable)
    except ValueError as error:
        raise ValueError(
            f"eps='match' found an rms of {rms:.3g} {where}, to which no eps belongs: {error}. Give other data, or a "
            "number as eps"
        ) from error


def check_match(given: GemSpec, c: float) -> None:
    """Raises ValueError where a family has no eps to choose, or c is no number that one can be chosen with."""
    if given.definition.fixed_eps is not None:
        raise ValueError(
            f"eps='match' chooses eps, and {given.family} has eps = {given.eps:g}, fixed; "
            f"the family {given.definition.kernels!r} has others"
        )
    if not 0 < c < math.inf:
        raise ValueError(f"c must be positive and finite, got {c!r}; the default is {MATCH_C}")
