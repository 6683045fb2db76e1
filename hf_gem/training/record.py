"""The record of a run: one JSON file from which cards, plots and tables are made, and the log it is built from."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from torch import nn

from ..files import check_type, read_json, redacted, shown, to_json, write_atomically
from ..modules import GemActivation
from .config import TrainConfig
from .data.order import SampleOrder
from .environment import environment
from .evaluate import Evaluation
from .launch import launched
from .task import Task
from .throughput import FLOP_COUNT

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEMA = 1


_Scalar = str | int | float | bool | None


class _Hardware(TypedDict):
    cpu: str
    gpus: list[str]
    torch_threads: int


class _LaterInSession(TypedDict, total=False):
    command: str
    diff_hash: str | None
    num_processes: int
    started: str
    first_step: int
    last_step: int


class _Session(_LaterInSession):
    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    hardware: _Hardware
    seconds: float


class _Sums(TypedDict, total=False):
    losses: list[float | None]
    correct: list[float | None]


class _Groups(_Sums):
    num_units: int
    counts: list[float]


class _Parts(TypedDict, total=False):
    validation: _Groups
    test: _Groups


class _Evaluation(_Parts):
    unit: str


class _Data(TypedDict):
    hash: str


class _Facts(TypedDict, total=False):
    run_id: str
    samples_hash: str | None
    evaluation: _Evaluation | None


class _Kept(_Facts, total=False):
    sessions: list[_Session]
    owes_evaluation: bool


class _Nonfinite(TypedDict):
    skipped_steps: int
    rollbacks: int
    skipped_batches: int


class _Saved(_Kept):
    log: list[dict[str, float | None]]
    nonfinite: _Nonfinite


class _Scales(TypedDict):
    rms: float


class _Match(TypedDict):
    hidden_act: str


class _InMost(_Facts, total=False):  # missing in records of older versions
    recipe: str
    preset: str
    step: int
    mixed_precision: str
    init_signs_hash: str | None
    order_hash: str | None
    nonfinite: dict[str, int]
    activation_inputs: _Scales | None
    match: _Match  # only with eps=match: what was asked for


class _Record(_InMost):
    status: Literal["running", "interrupted", "finished", "diverged"]
    config: dict[str, _Scalar]
    data: _Data
    sessions: list[_Session]
    result: dict[str, str | float | None]
    curves: dict[str, list[list[float | None]]]
    init_hash: str


class MetricsLog:
    """A JSONL file of metrics: one object per line, with the number of steps done in `step`.

    NaN and infinity become null, because JSON lacks them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []

    def start(self, entries: list[dict[str, Any]]) -> None:
        """Starts with the entries of the checkpoint to resume from, dropping what a killed run logged after it."""
        self.entries = list(entries)
        write_atomically(self.path, "".join(to_json(entry) + "\n" for entry in entries))

    def add(self, **entry: Any) -> None:
        """Appends one line and writes it at once, so that others can follow the file."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")

    def keys(self, *prefixes: str) -> list[str]:
        """Returns the metrics whose names start with one of the prefixes, in order of appearance."""
        return list(dict.fromkeys(key for entry in self.entries for key in entry if key.startswith(prefixes)))

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Returns the (step, value) pairs of one metric."""
        return [(entry["step"], entry[key]) for entry in self.entries if key in entry]


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes or updates a record. NaN and infinity become null, because JSON lacks them."""
    write_atomically(path, to_json({"schema": SCHEMA, **record}, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record, which may come from an untrusted source.

    Raises:
        ValueError: It cannot be read, or is not a record of a run. The message names file and field.
    """
    record: dict[str, Any] = read_json(path, _Record)
    if not record["sessions"]:
        raise ValueError(f"{path}: sessions must have at least one entry, got none")
    for name, curve in record["curves"].items():
        if any(len(pair) != 2 or pair[0] is None for pair in curve):
            raise ValueError(f"{path}: curves[{shown(name)}] must hold pairs of step and value")
    if not str(record["result"].get("unit", "none")).isalpha():
        raise ValueError(f"{path}: result.unit must be a word, got {shown(record['result']['unit'])}")
    if not 0 < (record.get("activation_inputs") or {"rms": 1})["rms"] < math.inf:
        raise ValueError(f"{path}: activation_inputs.rms must be above 0 and finite")
    _check_evaluation(record, f"{path}:")
    return record


def check_saved(value: Any, where: str) -> None:
    """Checks the part of a record that a checkpoint keeps.

    Args:
        value: The value read from a file.
        where: The place of the value, for the message.

    Raises:
        ValueError: The value is not what a run saves.
    """
    check_type(value, _Saved, where)
    for number, entry in enumerate(value["log"]):
        if not isinstance(entry.get("step"), int):
            raise ValueError(f"{where}.log[{number}].step must be a whole number, got {shown(entry.get('step'))}")
    for name, count in value["nonfinite"].items():
        if isinstance(count, int) and count < 0:
            raise ValueError(f"{where}.nonfinite.{name} must be at least 0, got {shown(count)}")
    _check_evaluation(value, where)


def _check_evaluation(holder: Mapping[str, Any], where: str) -> None:
    unit = (holder.get("evaluation") or {}).get("unit", "none")
    if not unit.isalpha():
        raise ValueError(f"{where} evaluation.unit must be a word, got {shown(unit)}")
    for part, groups in (holder.get("evaluation") or {}).items():
        if part in ("validation", "test"):
            sizes = {len(groups[name]) for name in ("counts", "losses", "correct") if name in groups}
            if len(sizes) > 1:
                raise ValueError(f"{where} evaluation.{part} must have lists of equal length, got {sorted(sizes)}")


def new_session(accelerator: Accelerator, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Makes the entry for one execution of the command. Each execution that takes steps gets its own entry.

    Args:
        accelerator: The accelerator of the run.
        sizes: The sizes that `fit_to_memory` chose for this machine.
    """
    return {
        **(environment() if accelerator.is_main_process else {}),
        "num_processes": accelerator.num_processes,
        "launcher": launched(accelerator),
        **sizes,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def new_record(task: Task, config: TrainConfig, accelerator: Accelerator, order: SampleOrder) -> dict[str, Any]:
    """Makes the record of a run that has not started. It is only complete on the main process."""
    hashes = accelerator.is_main_process
    return {
        "status": "running",
        "run_id": secrets.token_hex(4),
        "recipe": task.name,
        "preset": task.preset,
        "config": {**redacted(asdict(config)), "output_dir": config.output_dir},
        "mixed_precision": accelerator.mixed_precision,
        "data": task.data,
        **task.facts,
        "init_hash": hash_weights(task.model) if hashes else None,
        "init_signs_hash": hash_weights(task.model, signs=True) if hashes else None,
        "order_hash": order.hash(config.steps, config.global_batch_size),
        "samples_hash": None,  # of the first micro-batch as the model sees it, cropped, flipped and masked
        "evaluation": None,
        "num_parameters": sum(p.numel() for p in task.model.parameters()),
        "nonfinite": {"skipped_steps": 0, "rollbacks": 0, "skipped_batches": 0},
        "sessions": [],
    }


def evaluation_record(task: Task, found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Makes the record's summary of the last evaluation, from which intervals can count documents or images.

    Args:
        task: The task that was evaluated.
        found: Part of the data, `validation` or `test` -> its evaluation.
    """
    parts = {part: {"num_units": e.num_units, **e.groups} for part, e in found.items() if e.groups is not None}
    return {"unit": {"tokens": "documents"}.get(task.unit, task.unit), **parts}


def results(log: MetricsLog, task: Task) -> dict[str, Any]:
    """Computes the part of a record that follows from the log: `result` and `curves`."""
    curves = {key: curve for key in log.keys("validation_", "test_") if (curve := log.curve(key))}
    losses = [loss for _, loss in curves.get("validation_loss", [])]
    finite = [loss for loss in losses if math.isfinite(loss)]

    def median(key: str) -> float | None:
        values = [value for _, value in log.curve(key)]
        return float(np.median(values)) if values else None

    return {
        "result": {
            "initial_validation_loss": losses[0] if losses else None,
            "best_validation_loss": min(finite, default=None),
            **{key: curve[-1][1] for key, curve in curves.items()},
            "unit": task.unit,
            "units_per_second": median(f"{task.unit}_per_second"),
            "mfu": median("mfu"),
            "data_wait": median("data_wait"),
            "flop_count": FLOP_COUNT if task.flops_per_unit else None,
        },
        "curves": {"loss": log.curve("loss"), **curves},
    }


def hash_weights(model: nn.Module, signs: bool = False) -> str:
    """Computes a SHA-256 over names, shapes and values of all parameters except those of activations.

    Args:
        model: The model with the parameters.
        signs: Whether to hash signs instead of values. Weights from the same draw then have the same hash at any scale.
    """
    ours = {p for module in model.modules() if isinstance(module, GemActivation) for p in module.parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters() if p not in ours}
    return hash_tensors({name: weight.sign() if signs else weight for name, weight in weights.items()})


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Computes a SHA-256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
