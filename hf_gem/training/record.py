"""The record of a run: one JSON file from which cards, plots and tables are made, and the log it grows from."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import reprlib
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np
import torch
from torch import nn

from ..files import check_type, read_json, redact, redacted, to_json, write_atomically
from ..modules import GemActivation
from .config import TrainConfig
from .data.order import SampleOrder
from .evaluate import Evaluation
from .launch import launched
from .task import Task
from .throughput import FLOP_COUNT

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEMA = 1
_PACKAGES = ("hf-gem", "transformers", "accelerate", "datasets", "tokenizers", "timm", "triton", "numpy")


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


class _InMost(_Facts, total=False):  # not in records of older versions
    recipe: str
    preset: str
    step: int
    mixed_precision: str
    init_signs_hash: str | None
    order_hash: str | None
    nonfinite: dict[str, int]
    activation_inputs: _Scales | None


class _Record(_InMost):
    status: Literal["running", "interrupted", "finished", "diverged"]
    config: dict[str, _Scalar]
    data: _Data
    sessions: list[_Session]
    result: dict[str, str | float | None]
    curves: dict[str, list[list[float | None]]]
    init_hash: str


class MetricsLog:
    """A JSONL file of metrics, one object a line, with the number of steps done under `step`.

    NaN and infinity, which JSON lacks, are null in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []

    def start(self, entries: list[dict[str, Any]]) -> None:
        """Begins with the entries of the checkpoint that is continued; what a killed run logged after it is dropped."""
        self.entries = list(entries)
        write_atomically(self.path, "".join(to_json(entry) + "\n" for entry in entries))

    def add(self, **entry: Any) -> None:
        """Appends one line, at once on disk for whoever reads along."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(to_json(entry) + "\n")

    def keys(self, *prefixes: str) -> list[str]:
        """The metrics whose names start with one of these, in the order in which they came."""
        return list(dict.fromkeys(key for entry in self.entries for key in entry if key.startswith(prefixes)))

    def curve(self, key: str) -> list[tuple[int, float]]:
        """The (step, value) pairs of one metric."""
        return [(entry["step"], entry[key]) for entry in self.entries if key in entry]


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record, or brings it up to date; NaN and infinity, which JSON lacks, as null."""
    write_atomically(path, to_json({"schema": SCHEMA, **record}, indent=2) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """A record, of whatever origin.

    Raises:
        ValueError: it cannot be read, or is not what a run writes; the message names file and field.
    """
    record: dict[str, Any] = read_json(path, _Record)
    if not record["sessions"]:
        raise ValueError(f"{path}: sessions must have one at least, got none")
    for name, curve in record["curves"].items():
        if any(len(pair) != 2 or pair[0] is None for pair in curve):
            raise ValueError(f"{path}: curves[{reprlib.repr(name)}] must have pairs of step and value")
    if not str(record["result"].get("unit", "none")).isalpha():
        raise ValueError(f"{path}: result.unit must be a word, got {reprlib.repr(record['result']['unit'])}")
    if not 0 < (record.get("activation_inputs") or {"rms": 1})["rms"] < math.inf:
        raise ValueError(f"{path}: activation_inputs.rms must be above 0 and finite")
    _check_evaluation(record, f"{path}:")
    return record


def check_saved(value: Any, where: str) -> None:
    """Checks what a checkpoint keeps for the record of its run.

    Args:
        value: Of a file.
        where: Its place, for the message.

    Raises:
        ValueError: it is not what a run saves.
    """
    check_type(value, _Saved, where)
    for number, entry in enumerate(value["log"]):
        if not isinstance(entry.get("step"), int):
            raise ValueError(f"{where}.log[{number}].step must be a whole number, got {entry.get('step')}")
    for name, count in value["nonfinite"].items():
        if isinstance(count, int) and count < 0:
            raise ValueError(f"{where}.nonfinite.{name} must be at least 0, got {count}")
    _check_evaluation(value, where)


def _check_evaluation(holder: Mapping[str, Any], where: str) -> None:
    unit = (holder.get("evaluation") or {}).get("unit", "none")
    if not unit.isalpha():
        raise ValueError(f"{where} evaluation.unit must be a word, got {reprlib.repr(unit)}")
    for part, groups in (holder.get("evaluation") or {}).items():
        if part in ("validation", "test"):
            sizes = {len(groups[name]) for name in ("counts", "losses", "correct") if name in groups}
            if len(sizes) > 1:
                raise ValueError(f"{where} evaluation.{part} must have lists of one length, got {sorted(sizes)}")


def new_session(accelerator: Accelerator, sizes: Mapping[str, int]) -> dict[str, Any]:
    """An entry for each time the command ran and took steps: nothing that happened elsewhere is claimed for it.

    Args:
        accelerator: Of the run.
        sizes: What was chosen for the memory of this machine, of `fit_to_memory`.
    """
    return {
        **(environment() if accelerator.is_main_process else {}),
        "num_processes": accelerator.num_processes,
        "launcher": launched(accelerator),
        **sizes,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def new_record(task: Task, config: TrainConfig, accelerator: Accelerator, order: SampleOrder) -> dict[str, Any]:
    """The record of a run that has not begun. It is whole on the main process only."""
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
    """What a record keeps of the last evaluation, for intervals that count documents or images as well as seeds.

    Args:
        task: Which was evaluated.
        found: Part of the data, `validation` or `test` -> what was found.
    """
    parts = {part: {"num_units": e.num_units, **e.groups} for part, e in found.items() if e.groups is not None}
    return {"unit": {"tokens": "documents"}.get(task.unit, task.unit), **parts}


def results(log: MetricsLog, task: Task) -> dict[str, Any]:
    """The part of a record that follows from the log: `result` and `curves`."""
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


def environment(folder: Path | None = None) -> dict[str, Any]:
    """Command, commit, versions and hardware of this process.

    Args:
        folder: Of the code whose commit is meant; by default that of the script.
    """
    return {
        "command": command(),
        **_commit(folder or Path(sys.argv[0]).resolve().parent),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build, which the package's metadata leaves out
            **{p: v for p in _PACKAGES if (v := _version(p))},
        },
        "hardware": hardware(),
    }


def command() -> str:
    """The command as it would be typed in the current folder, without secrets; of the launcher's own flags nothing is
    known here.
    """
    script = Path(sys.argv[0])
    if script.is_absolute() and script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    launcher = ["python"]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun"]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # which every launcher of accelerate sets, torchrun's beside it
        launcher = ["accelerate", "launch"]
    return redact(shlex.join([*launcher, str(script), *sys.argv[1:]]))


def hardware() -> dict[str, Any]:
    """Processor, number of threads and accelerators."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
    }


def hash_weights(model: nn.Module, signs: bool = False) -> str:
    """SHA-256 over names, shapes and values of all parameters but those of activations: equal for equal weights.

    Args:
        model: Whose parameters.
        signs: Takes signs in place of values: equal for equal draws of weights, whatever their scale.
    """
    ours = {p for module in model.modules() if isinstance(module, GemActivation) for p in module.parameters()}
    weights = {name: p.detach() for name, p in model.named_parameters() if p not in ours}
    return hash_tensors({name: weight.sign() if signs else weight for name, weight in weights.items()})


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            # In a session of its own: a Ctrl-C here must not leave a record without its commit.
            command = ["git", "-C", str(folder), *arguments]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=False, start_new_session=True
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status, changes = git("status", "--porcelain"), git("diff", "HEAD")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "diff_hash": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
