"""Measures the scale of the inputs of a model's activations, and chooses eps accordingly."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..family.names import GemSpec
from ..files import shown
from ..fit import MATCH_C, Histogram, match_eps
from .calibrate import Calibration, Scales, record_inputs
from .slots import Slot


def input_scales(model: nn.Module, slots: Mapping[str, Slot], batches: Iterable[Any]) -> Scales:
    """Runs batches and measures the root mean square of the inputs of activations.

    It runs without gradients and dropout, and does not change the model. Batch normalisation uses the statistics of the
    batch, as in training, because the running statistics of a new model are still 0 and 1.

    Args:
        model: The model that contains the slots.
        slots: Path -> slot of an activation.
        batches: Batches as for `hf_gem.convert`.

    Returns:
        The root mean square of the inputs of each activation, and over all of them.

    Raises:
        ValueError: The model does not run on a batch.
    """
    recorders = record_inputs(model, slots, batches, batch_statistics=True)
    ran = {path: recorder for path, recorder in recorders.items() if recorder.histogram.counts.any()}
    distinct = {id(recorder): recorder.histogram for recorder in ran.values()}
    pooled = sum(distinct.values(), Histogram())
    return Scales(pooled.rms, {path: recorder.histogram.rms for path, recorder in ran.items()})


def match(
    model: nn.Module, slots: Mapping[str, Slot], given: GemSpec, batches: Iterable[Any], per_layer: bool, c: float
) -> Calibration:
    """Chooses eps so that the gate is half open at c times the rms of the inputs of the activations.

    Args:
        model: The model.
        slots: Path -> slot of an activation.
        given: Member that gives the family and n.
        batches: Batches as for `hf_gem.convert`.
        per_layer: Whether to use the rms of each activation instead of the rms over all of them. Activations that did
            not run get the eps for the rms over all.
        c: Half point of the gate in units of the rms.

    Returns:
        The chosen members and the measured scales.

    Raises:
        ValueError: The model does not run on a batch, no activation ran, or an rms is 0 or not finite.
    """
    scales = input_scales(model, slots, batches)
    if not scales.layers:
        raise ValueError(
            "none of the activations ran on data=. eps='match' needs at least one that does. Pass batches that reach "
            "the activations."
        )
    members = {}
    for path in slots:
        rms = scales.layers.get(path, scales.rms) if per_layer else scales.rms
        members[path] = matched(given, rms, c, f"at {path}" if per_layer else "over all activations")
    return Calibration(members, scales=scales)


def matched(given: GemSpec, rms: float, c: float, where: str) -> GemSpec:
    """Returns the member with the eps for an rms. `where` says in an error message where the rms was measured."""
    try:
        return GemSpec(given.family, given.n, match_eps(rms, given.n, c), given.learnable)
    except ValueError as error:
        raise ValueError(
            f"eps='match' measured an rms of {rms:.3g} {where}, and found no eps for it: {error} Pass other data, or a "
            "number as eps."
        ) from error


def check_match(given: GemSpec, c: float) -> None:
    """Raises ValueError if the family has no eps to choose, or if c is out of range."""
    if given.definition.fixed_eps is not None:
        raise ValueError(
            f"got eps='match' for {given.family}, which has a fixed eps of {given.eps:g}. eps='match' needs a family "
            f"whose eps can be chosen. Use {given.definition.kernels!r}, or leave out eps."
        )
    if not 0 < c < math.inf:
        raise ValueError(f"got c={shown(c)}. c must be positive and finite. The default is {MATCH_C}.")
