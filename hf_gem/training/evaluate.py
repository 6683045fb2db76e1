"""Evaluation and its metrics. `metrics.py` wraps the metrics as subclasses of `evaluate.Metric`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from .._torch import without_compiler
from .device import batch_to_device
from .errors import DataError, Interrupted, reason
from .loss import IGNORE, Output
from .signals import agreed_stop
from .task import Samples

_SUMMED, _PAIRED = ("losses", "counts", "correct"), ("predictions", "references")
MOST_GROUPS = 256  # groups of units whose sums a record keeps: enough to estimate a variance
_AGREE_EVERY = 10  # rounds, because agreeing waits for the device


def perplexity(losses: Sequence[float], targets: Sequence[int]) -> float:
    """Computes exp of the mean loss per token.

    Args:
        losses: Losses in nats, each summed over some tokens.
        targets: Number of tokens in each sum.
    """
    mean = math.fsum(losses) / sum(targets)
    return math.exp(mean) if mean < 700 else math.inf


def accuracy(predictions: Sequence[int], references: Sequence[int]) -> float:
    """Computes the share of predictions that equal their references, without references equal to `IGNORE`."""
    counted = np.asarray(references) != IGNORE
    return float((np.asarray(predictions) == np.asarray(references))[counted].mean())


def relative_l2(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Computes the norm of the errors divided by the norm of the references, for values of a field on a grid.

    A prediction of zero everywhere scores 1.
    """
    found, exact = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def log10_relative_l2(predictions: Sequence[float], references: Sequence[float]) -> float:
    """Computes the decimal logarithm of `relative_l2`, so that differences are ratios of errors."""
    error = relative_l2(predictions, references)
    return -math.inf if error == 0 else math.log10(error)


METRICS: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    metric.__name__: metric for metric in (perplexity, accuracy, relative_l2, log10_relative_l2)
}


@dataclass
class Evaluation:
    """The result of an evaluation. It is empty except on the main process.

    Attributes:
        values: The metrics and `loss`, the mean over all targets, which is in nats except for fields.
        groups: Lists with one number for each group of units, such as documents or images: the number of targets
            (`counts`), the summed `losses`, and for classifiers the number of `correct` predictions. Unit k is in group
            k modulo `MOST_GROUPS`. None if samples or objective do not say which loss belongs to which unit.
        num_units: Number of units.
    """

    values: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[Any]] | None = None
    num_units: int = 0


@torch.no_grad()
def evaluate(
    objective: nn.Module, samples: Samples, metrics: Sequence[str], batch_size: int, accelerator: Accelerator
) -> Evaluation:
    """Computes loss and metrics over all samples, counting each target once. All processes must call it.

    Args:
        objective: The objective on the accelerator's device. Of all wrappers, only FSDP's is allowed.
        samples: The samples to evaluate on.
        metrics: Names of `METRICS`.
        batch_size: Largest number of samples in one forward pass of one process.
        accelerator: The accelerator of the run.

    Raises:
        DataError: The samples cannot be read.
        Interrupted: A signal arrived. All processes raise this.
    """
    objective.eval()
    world, rank = accelerator.num_processes, accelerator.process_index
    if world > 1:
        for buffer in objective.buffers():  # batch-norm statistics: those of rank 0 are the ones that are saved
            torch.distributed.broadcast(buffer, 0)
    count, rows = len(samples), _Rows()
    rounds = range(0, count, world * batch_size)  # the same on each process: FSDP gathers weights in every one
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    for number, first in enumerate(tqdm(rounds, desc="Evaluating", leave=False, disable=hidden)):
        if world == 1 or number % _AGREE_EVERY == 0:
            _check(accelerator)
        indices = np.arange(first + rank * batch_size, min(first + (rank + 1) * batch_size, count))
        batch = _read(samples, indices if len(indices) else np.zeros(1, np.int64))
        units = batch.pop("units", None)
        # Evaluation mode and the size of the last batch would each trigger a compilation, for little work.
        with without_compiler():
            output = objective(**batch_to_device(batch, accelerator.device))
        if len(indices):
            rows.add(output, batch["labels"], units)
    mine = rows.sums()
    parts = gather_object([mine]) if world > 1 else [mine]
    return _together(parts, metrics) if accelerator.is_main_process else Evaluation()


class _Rows:
    """Collects the outputs of one process. They stay on the device to the end, since each fetch would wait for it."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}

    def add(self, output: Output, labels: torch.Tensor, units: torch.Tensor | None) -> None:
        counted = labels != IGNORE
        row = {"losses": output.loss, "counts": counted.sum()}
        if output.losses is not None and units is not None:
            row = {"losses": output.losses, "counts": counted, "units": units}
        if output.predictions is not None:
            row |= {"predictions": output.predictions, "references": labels}
        for key, tensor in row.items():
            self._parts.setdefault(key, []).append(tensor.reshape(-1))

    def sums(self) -> dict[str, np.ndarray]:
        """Returns `losses` and `counts` per group (one if there are no units), and all predictions and references.

        It is empty if there are no rows.
        """
        if not self._parts:
            return {}
        found = {key: torch.cat(parts).cpu().numpy() for key, parts in self._parts.items()}
        units = found.pop("units", None)
        if units is not None:
            found["num_units"] = units.max(keepdims=True) + 1
        group = units % MOST_GROUPS if units is not None else np.zeros(len(found["losses"]), np.int64)
        if "predictions" in found and units is not None:
            found["correct"] = found["predictions"] == found["references"]
        size = MOST_GROUPS if units is not None else 1
        for key in _SUMMED:
            if key in found:
                found[key] = np.bincount(group, found[key].astype(np.float64), size)
        return found


def _together(parts: Sequence[Mapping[str, np.ndarray]], metrics: Sequence[str]) -> Evaluation:
    """Merges the parts of all processes into one evaluation. A process without samples has an empty part."""
    parts = [part for part in parts if part]
    sums = {key: np.sum([part[key] for part in parts], axis=0) for key in _SUMMED if key in parts[0]}
    pairs = [np.concatenate([part[key] for part in parts]) for key in _PAIRED if key in parts[0]]
    loss = math.fsum(sums["losses"]) / float(sums["counts"].sum())
    compared = pairs or (sums["losses"], sums["counts"])
    values = {"loss": loss, **{name: METRICS[name](*compared) for name in metrics}}
    if "num_units" not in parts[0]:
        return Evaluation(values)
    used = sums["counts"] > 0
    groups: dict[str, list[Any]] = {"losses": [float(f"{loss:.8g}") for loss in sums.pop("losses")[used]]}
    groups |= {key: found[used].astype(int).tolist() for key, found in sums.items()}
    return Evaluation(values, groups, int(max(part["num_units"][0] for part in parts)))


def _check(accelerator: Accelerator) -> None:
    if number := agreed_stop(accelerator):
        raise Interrupted("stopped during an evaluation; run the same command again to continue", number)


def _read(samples: Samples, indices: np.ndarray) -> dict[str, torch.Tensor]:
    try:
        return samples.batch(indices)
    except Exception as error:  # each kind of data raises its own
        raise DataError(
            f"cannot read the evaluation samples: {reason(error)}. Fix the data and run the same command again."
        ) from error
