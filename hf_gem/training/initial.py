"""What a run starts from: new weights, the scale of what the activations are given, and an eps chosen by that."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from ..family.names import parse
from ..surgery.calibrate import Scales
from ..surgery.kinds import activation_slots
from ..surgery.scales import input_scales, matched
from .config import TrainConfig
from .data.order import SampleOrder
from .device import batch_to_device
from .errors import ConfigError, DataError
from .signals import check
from .task import Task

# What is measured on: seconds of a CPU, and millions of values of most models.
_MOST_SINGLE, _MOST_SEQUENCES, _MOST_TOKENS = 64, 8, 2048


def new_task(make: Callable[[], Task], config: TrainConfig) -> Task:
    """The task of a recipe with weights drawn from the seed; its facts say what the activations are given.

    With `--eps match`, eps is chosen by that: the model is built with the eps of `hidden_act`, measured, and built
    again from the same seed with the name that came out, which is in `hidden_act` from then on.

    Args:
        make: Builds the model, on the CPU, and the task. Called again, it reads `config.hidden_act` again.
        config: Of the run.

    Raises:
        ConfigError: no eps belongs to what was measured.
        DataError: the first samples cannot be read.
        Interrupted: a signal arrived.
    """
    task = _seeded(make, config)
    if config.eps == "match":
        asked, rms = config.hidden_act, first_scales(task, config).rms
        try:
            config.hidden_act = matched(parse(asked), rms, config.match_c, "over all activations").name
        except ValueError as error:
            raise ConfigError(str(error)) from error
        task = _seeded(make, config)
        task.facts["match"] = {"hidden_act": asked, "rms": rms, "c": config.match_c}
    task.facts["activation_inputs"] = activation_inputs(task, config)
    return task


def _seeded(make: Callable[[], Task], config: TrainConfig) -> Task:
    torch.manual_seed(config.seed)
    return make()


def activation_inputs(task: Task, config: TrainConfig) -> dict[str, object] | None:
    """What a record says of `first_scales`; None where no activation is found, as where all are calls in a forward."""
    scales = first_scales(task, config)
    return dataclasses.asdict(scales) if scales.layers else None


def first_scales(task: Task, config: TrainConfig) -> Scales:
    """The scale of what the activations of a model are given by the first samples of its run.

    These are 64 images or points, or as many sequences as have 2048 tokens, from 1 to 8, whatever the size of a
    batch: a function of data and data seed. The model runs where it is, in its own precision, without dropout and
    mixing.

    Raises:
        DataError: the samples cannot be read.
        Interrupted: a signal arrived.
    """
    check()
    sequences = min(max(_MOST_TOKENS // task.units_per_sample, 1), _MOST_SEQUENCES)
    count = _MOST_SINGLE if task.units_per_sample == 1 else sequences
    indices = SampleOrder(len(task.train), config.data_seed).batch(0, count)
    try:
        batch = task.train.batch(indices, np.arange(count))
    except Exception as error:  # whatever the data are made of
        raise DataError(
            f"the first samples cannot be read: {type(error).__name__}: {error}; fix the data, and start again"
        ) from error
    slots = {slot.path: slot for slot in activation_slots(task.model)}
    device = next(task.model.parameters()).device
    return input_scales(task.objective, slots, [batch_to_device(batch, device)])
