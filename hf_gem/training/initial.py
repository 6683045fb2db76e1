"""Sets up the start of a run: new weights, the scale of the activations' inputs, and an eps chosen by that scale."""

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
from .errors import ConfigError, DataError, reason
from .signals import check
from .task import Task

# How much to measure on: this takes seconds on a CPU, and gives millions of values in most models.
NUM_SINGLE, _MOST_SEQUENCES, _MOST_TOKENS = 64, 8, 2048


def new_task(make: Callable[[], Task], config: TrainConfig) -> Task:
    """Builds the task of a recipe with weights drawn from the seed, and measures the inputs of its activations.

    The measurement becomes part of the task's facts. With `--eps match`, it also chooses eps: the model is built with
    the eps of `hidden_act`, measured, and built again from the same seed with the matched name, which then replaces
    `config.hidden_act`.

    Args:
        make: Builds the model on the CPU, and the task. Each call must read `config.hidden_act` again.
        config: The config of the run.

    Raises:
        ConfigError: No eps matches the measurement.
        DataError: The first samples cannot be read.
        Interrupted: A signal arrived.
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
    """Returns `first_scales` for the record. None if there is no activation module: all may be calls in a forward."""
    scales = first_scales(task, config)
    return dataclasses.asdict(scales) if scales.layers else None


def first_scales(task: Task, config: TrainConfig) -> Scales:
    """Measures the scale of the activations' inputs on the first samples of a run.

    The samples are 64 images or points, or 1 to 8 sequences with about 2048 tokens in total. They depend on data and
    data seed, not on the batch size. The model runs on its current device in its own precision, without dropout and
    mixing.

    Raises:
        DataError: The samples cannot be read.
        Interrupted: A signal arrived.
    """
    check()
    sequences = min(max(_MOST_TOKENS // task.units_per_sample, 1), _MOST_SEQUENCES)
    count = NUM_SINGLE if task.units_per_sample == 1 else sequences
    indices = SampleOrder(len(task.train), config.data_seed).batch(0, count)
    try:
        batch = task.train.batch(indices, np.arange(count))
    except Exception as error:  # each kind of data raises its own
        raise DataError(
            f"cannot read the first samples: {reason(error)}. Fix the data and run the same command again."
        ) from error
    slots = {slot.path: slot for slot in activation_slots(task.model)}
    device = next(task.model.parameters()).device
    return input_scales(task.objective, slots, [batch_to_device(batch, device)])
