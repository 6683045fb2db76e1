"""Evaluation, and its metrics; `metrics.py` has them as subclasses of `evaluate.Metric`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from .._torch import without_compiler
from .device import batch_to_device
from .errors import DataError, Interrupted
from .loss import IGNORE
from .signals import agreed_stop
from .task import Task

_AGREE_EVERY = 10  # rounds, for agreeing waits for the device


def perplexity(losses: Sequence[float], targets: Sequence[int]) -> float:
    """exp of the mean loss of a token.

    Args:
        losses: In nats, each summed over some tokens.
        targets: The numbers of these tokens.
    """
    mean = math.fsum(losses) / sum(targets)
    return math.exp(mean) if mean < 700 else math.inf


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Share of predictions that equal their references; references equal to `IGNORE` are left out."""
    counted = np.asarray(references) != IGNORE
    return float((np.asarray(predictions) == np.asarray(references))[counted].mean())


def relative_l2(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The norm of all errors over that of all references, for values of a field on a grid; a field of zeros has 1."""
    found, exact = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def log10_relative_l2(predictions: Sequence[float], references: Sequence[float]) -> float:
    """The decimal logarithm of `relative_l2`, whose differences are ratios of errors."""
    error = relative_l2(predictions, references)
    return -math.inf if error == 0 else math.log10(error)


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    metric.__name__: metric for metric in (perplexity, accuracy, relative_l2, log10_relative_l2)
}


@torch.no_grad()
def evaluate(objective: nn.Module, task: Task, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Loss and metrics over the whole validation set, each target counted once.

    Args:
        objective: On the device of the accelerator, but not wrapped by it, except by FSDP.
        task: Whose validation samples and metrics are used.
        batch_size: Samples in one forward pass of one process, at most.
        accelerator: All of whose processes call this.

    Returns:
        `loss`, the mean over all targets, and the metrics; empty but on the main process.

    Raises:
        DataError: samples cannot be read.
        Interrupted: a signal arrived; it is raised on all processes.
    """
    objective.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    if world > 1:
        for buffer in objective.buffers():  # statistics of batch normalisation, of which those of rank 0 are saved
            torch.distributed.broadcast(buffer, 0)
    count = len(task.validation)
    rows: dict[str, list[Any]] = {"losses": [], "targets": [], "predictions": [], "references": []}
    rounds = range(0, count, world * batch_size)  # as many on each process, for FSDP gathers weights in each
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    for number, first in enumerate(tqdm(rounds, desc="Evaluating", leave=False, disable=hidden)):
        if world == 1 or number % _AGREE_EVERY == 0:
            _check(accelerator)
        indices = np.arange(first + rank * batch_size, min(first + (rank + 1) * batch_size, count))
        batch = _read(task, indices if len(indices) else np.zeros(1, np.int64))
        # The modes of evaluation and the size of its last batch would each be compiled anew, for a share of the work.
        with without_compiler():
            output = objective(**batch_to_device(batch, accelerator.device))
        if len(indices):
            rows["losses"].append(output.loss)
            rows["targets"].append((batch["labels"] != IGNORE).sum())
            if output.predictions is not None:
                rows["predictions"].extend(output.predictions.unbind())
                rows["references"].extend(batch["labels"].unbind())
    mine = {key: torch.stack(values).tolist() if values else [] for key, values in rows.items()}
    gathered = gather_object([mine]) if world > 1 else [mine]
    if not accelerator.is_main_process:
        return {}
    return _values({key: [value for part in gathered for value in part[key]] for key in rows}, task.metrics)


def _check(accelerator: Accelerator) -> None:
    if number := agreed_stop(accelerator):
        raise Interrupted("stopped in an evaluation; the same command goes on", number)


def _read(task: Task, indices: np.ndarray) -> dict[str, torch.Tensor]:
    try:
        return task.validation.batch(indices)
    except Exception as error:  # whatever the data are made of
        raise DataError(f"validation samples cannot be read: {type(error).__name__}: {error}") from error


def _values(rows: dict[str, list[Any]], metrics: Sequence[str]) -> dict[str, float]:
    predictions, references = rows["predictions"] or rows["losses"], rows["references"] or rows["targets"]
    loss = math.fsum(rows["losses"]) / sum(rows["targets"])
    return {"loss": loss, **{name: METRICS[name](predictions, references) for name in metrics}}
