"""The training loop: pure-function batches and learning rates, exact normalisation, evaluation, checkpoints, logs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from .checkpoint import CheckpointStore
from .config import TrainConfig, trajectory
from .errors import ConfigError, DataError, Interrupted, TrainingError
from .loss import IGNORE
from .metrics import FLOP_COUNT, peak_flops
from .optim import adamw, learning_rate
from .order import SampleOrder
from .record import MetricsLog, environment, hash_tensors, write_record


class Samples(Protocol):
    """Data by index. Labels equal to `IGNORE` are not targets."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        """The keyword arguments of the objective for some samples, `labels` among them.

        Args:
            indices: Which samples.
            draws: In training, the number of each in the order of the whole run: what is random about a sample, masks
                or augmentation, is a function of it and of a seed. None in evaluation, which is always the same.
        """
        ...


@dataclass
class Task:
    """What is trained on what.

    Attributes:
        name: The recipe, as it appears in the record.
        preset: The preset, likewise.
        model: What is saved at the end; of transformers, if it is to recompute activations in the backward pass.
        objective: Wraps `model`; its forward takes a batch and returns the summed loss over all targets.
        train: Training samples.
        validation: Validation samples, all of which are evaluated.
        data: What the record says of the data; its `hash` identifies it.
        units_per_sample: How much of what throughput counts is in a sample: tokens, or 1 image.
        unit: What that is called.
        flops_per_unit: Training FLOPs for one, for the share of peak reported as MFU.
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


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with precision, trackers and determinism as configured.

    Raises:
        ConfigError: this machine, or the way it was launched, cannot do what was asked for.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where there is any; no effect on a CPU
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    # On every save it reports that tied weights are stored once, which is what it is asked to do.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        # The loop accumulates by itself; what a launcher says about it would scale the gradients a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise ConfigError(f"these recipes run on one process or with DDP, and the launcher chose {kind.value}")
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigError(
            f"--mixed_precision can be no, bf16 or fp16; the launcher chose {accelerator.mixed_precision}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"fp16 needs a CUDA device, and this is {accelerator.device}; use --mixed_precision bf16 or no"
        )
    if config.report_to != "none" and not accelerator.log_with:
        raise ConfigError(
            f"--report_to {config.report_to} needs its package: pip install {config.report_to}, or use none"
        )
    threads, cores = torch.get_num_threads(), (os.cpu_count() or 1) // accelerator.num_processes
    if accelerator.device.type == "cpu" and threads < cores:
        accelerator.print(f"training with {threads} of {cores} CPU threads; OMP_NUM_THREADS={cores} in front uses all")
    return accelerator


def train(task: Task, config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Trains, or goes on with, a run.

    The loss of a step is normalised by the number of targets in the global batch, and everything random is seeded from
    (seed, step, micro-batch), so a run is the same on any number of processes up to rounding, and bit for bit the same
    after a restart.

    Args:
        task: What to train.
        config: How.
        accelerator: From `make_accelerator`.

    Returns:
        The record of the run, also in `record.json` of the output folder. It is whole on the main process only.

    Raises:
        ConfigError: the global batch does not divide among the processes, or the output folder is not a run's.
        CheckpointError: a checkpoint cannot be read or written.
        DataError: samples cannot be read.
        TrainingError: the loss or the gradient is not finite, or a file cannot be written.
        Interrupted: Ctrl-C or SIGTERM arrived; the state was saved.
    """
    folder = Path(config.output_dir)
    try:
        with _sole_writer(folder) if accelerator.is_main_process else contextlib.nullcontext():
            return _Run(task, config, accelerator).train()
    except OSError as error:
        raise TrainingError(
            f"cannot write to {folder}: {error}. Complete checkpoints are still good; make room, or name another "
            "--output_dir, and start the same command again"
        ) from error
    finally:
        accelerator.end_training()


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Makes the output folder and keeps other runs out of it."""
    if (folder / "README.md").exists() and not (folder / "record.json").exists():
        raise ConfigError(f"{folder} holds a README.md that no run has written; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another process is training in {folder}; stop it or choose another --output_dir") from None
    try:
        yield
    finally:
        lock.release()


class _Run:
    def __init__(self, task: Task, config: TrainConfig, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        if config.global_batch_size % self.world:
            raise ConfigError(
                f"--global_batch_size {config.global_batch_size} must be a multiple of the {self.world} processes"
            )
        share = config.global_batch_size // self.world
        self.micro_batch_size = next(n for n in range(min(share, config.micro_batch_size), 0, -1) if share % n == 0)
        self.order = SampleOrder(len(task.train), config.data_seed)
        self.folder = Path(config.output_dir)
        self.log = MetricsLog(self.folder / "log.jsonl")
        # One entry for each time the command ran and took steps: nothing that happened elsewhere is claimed for it.
        self.session = {
            **(environment() if self.is_main else {}),
            "num_processes": self.world,
            "micro_batch_size": self.micro_batch_size,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self.record: dict[str, Any] = {
            "status": "running",
            "run_id": secrets.token_hex(4),
            "recipe": task.name,
            "preset": task.preset,
            "config": asdict(config),
            "mixed_precision": accelerator.mixed_precision,
            "data": task.data,
            "init_hash": hash_tensors(task.model) if self.is_main else None,
            "num_parameters": sum(p.numel() for p in task.model.parameters()),
            "sessions": [],
        }
        if config.gradient_checkpointing:
            model: Any = task.model
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )  # newer name
            enable({"use_reentrant": False})
        if config.compile:
            task.objective.compile()
        self.objective, self.optimizer = accelerator.prepare(task.objective, adamw(task.objective, config))
        decides = {**trajectory(config), "mixed_precision": accelerator.mixed_precision, "data_hash": task.data["hash"]}
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", config.keep_checkpoints, decides)

    def train(self) -> dict[str, Any]:
        config, steps = self.config, self.config.steps
        start, state = self.checkpoints.restore(self.accelerator, config.resume)
        if self.is_main:
            state = state or {"log": [], "sessions": [], "run_id": self.record["run_id"]}
            self.log.start(state["log"])
            self.record.update(run_id=state["run_id"], sessions=state["sessions"])
            if start < steps:
                self.session["first_step"] = start + 1
                self.record["sessions"].append(self.session)
        self.began = time.perf_counter()
        self._start_tracker()
        if start == 0:
            self._evaluate(0)
        self._write_record(start, "running" if start < steps else "finished")
        saved = start
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self._loader = ThreadPoolExecutor(1, "loader")
        if start < steps:
            self._next = self._loader.submit(self._batches, start)
        clock = _Clock(self.accelerator.device)
        with self._progress(start) as bar, _catch_signals() as caught, self._loader:
            for step in range(start, steps):
                loss = self._step(step)
                clock.add(config.global_batch_size * self.task.units_per_sample)
                done = step + 1
                if done % config.log_every == 0 or done in (1, steps):
                    self._log_step(done, loss, clock, bar)
                bar.update()
                if done == steps or (config.eval_every and done % config.eval_every == 0):
                    with clock.paused():
                        self._evaluate(done)
                if done == steps or (config.save_every and done % config.save_every == 0):
                    with clock.paused():
                        self._save(done, "finished" if done == steps else "running")
                    saved = done
                if done < steps and (number := self._stop_requested(caught, done)):
                    if saved == done:
                        self._write_record(done, "interrupted")
                    else:
                        self._save(done, "interrupted")
                    raise Interrupted(f"stopped at step {done} of {steps}, saved; the same command goes on", number)
        return self.record

    def _batches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of this process. Number k of rank r is slice k * world + r of the global batch."""
        size = self.config.global_batch_size
        drawn = np.stack([self.order.batch(step, size), np.arange(step * size, (step + 1) * size)])
        mine = drawn.reshape(2, -1, self.world, self.micro_batch_size)[:, :, self.rank]
        return [self.task.train.batch(indices, draws) for indices, draws in mine.swapaxes(0, 1)]

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; returns the mean loss over the global batch."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        try:
            batches = self._next.result()
        except Exception as error:  # whatever the data are made of
            raise DataError(
                f"the samples of step {step + 1} cannot be read: {type(error).__name__}: {error}. Complete checkpoints "
                f"in {self.checkpoints.folder} are good; mend the data, and the same command goes on"
            ) from error
        if step + 1 < config.steps:
            self._next = self._loader.submit(self._batches, step + 1)  # while the device computes this one
        mine_targets = float(sum((b["labels"] != IGNORE).sum() for b in batches))
        # It stays on the device, like the loss: nothing in a step waits for the device to catch up.
        num_targets = accelerator.reduce(torch.full((), mine_targets, device=accelerator.device), "sum")
        self.objective.train()
        total = torch.zeros((), device=accelerator.device)
        for k, batch in enumerate(batches):
            _seed(config.seed, step, k * self.world + self.rank)
            with contextlib.nullcontext() if k + 1 == len(batches) else accelerator.no_sync(self.objective):
                loss = self.objective(**_to(batch, accelerator.device))
                # DDP averages over processes, and this is a sum over them
                accelerator.backward(loss * (self.world / num_targets))
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), config.grad_clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean: torch.Tensor = accelerator.reduce(total, "sum") / num_targets
        self.finite &= mean.isfinite()
        if accelerator.scaler is None:  # which skips the step when a gradient overflows
            self.finite &= norm.isfinite()
        return mean

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Mean loss over every target of the validation set, each counted once."""
        # Not the prepared module: DDP synchronises buffers in forward, and the last batches are not on all processes.
        objective, accelerator = self.task.objective.eval(), self.accelerator
        sums = torch.zeros(2, dtype=torch.float64)
        size, count = self.micro_batch_size, len(self.task.validation)
        starts = range(self.rank * size, count, self.world * size)
        for first in tqdm(starts, desc="Evaluating", leave=False, disable=not self._shows_bar()):
            batch = self.task.validation.batch(np.arange(first, min(first + size, count)))
            loss = objective(**_to(batch, accelerator.device))
            sums += torch.stack([loss.cpu().double(), (batch["labels"] != IGNORE).sum().double()])
        if self.world > 1:
            sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
        loss_sum, targets = sums.tolist()
        loss = loss_sum / targets
        if self.is_main:
            self.log.add(step=step, validation_loss=loss)
            tqdm.write(f"step {step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
        accelerator.log({"validation_loss": loss}, step=step)

    def _check_finite(self, step: int) -> None:
        if not self.finite.item():  # waits for the device, as do all who call this
            raise TrainingError(
                f"the loss or the gradient stopped being finite at or before step {step}; nothing was saved since, and "
                f"the checkpoints in {self.checkpoints.folder} are good. Lower --learning_rate, lengthen "
                "--warmup_steps, or train in --mixed_precision bf16 or no"
            )

    def _log_step(self, step: int, loss: torch.Tensor, clock: _Clock, bar: tqdm) -> None:
        self._check_finite(step)
        value, rate = loss.item(), clock.lap()
        entry = {
            "loss": value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            f"{self.task.unit}_per_second": rate,
        }
        device = self.accelerator.device
        if self.task.flops_per_unit and (peak := peak_flops(device)):
            entry["mfu"] = rate * self.task.flops_per_unit / (peak * self.world)
        if device.type == "cuda":
            entry["max_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        if self.is_main:
            self.log.add(step=step, **entry)
            shown = {"loss": f"{value:.4f}", f"{self.task.unit}/s": f"{rate:,.0f}"}
            if "mfu" in entry:
                shown["MFU"] = f"{entry['mfu']:.1%}"
            bar.set_postfix(shown, refresh=False)
            if not self._shows_bar():
                text = ", ".join(f"{k} {v}" for k, v in shown.items())
                print(f"step {step} of {self.config.steps}: {text}", flush=True)
        self.accelerator.log(entry, step=step)

    def _save(self, step: int, status: str) -> None:
        self._check_finite(step)
        self._update_record(step, status)
        state = {"log": self.log.entries, "sessions": self.record["sessions"], "run_id": self.record["run_id"]}
        self.checkpoints.save(self.accelerator, step, state)
        if self.is_main:
            write_record(self.folder / "record.json", self.record)

    def _update_record(self, step: int, status: str) -> None:
        self.session.update(last_step=step, seconds=round(time.perf_counter() - self.began, 1))
        validation = self.log.curve("validation_loss")

        def median(key: str) -> float | None:
            values = [value for _, value in self.log.curve(key)]
            return float(np.median(values)) if values else None

        self.record.update(
            status=status,
            step=step,
            result={
                "initial_validation_loss": validation[0][1] if validation else None,
                "validation_loss": validation[-1][1] if validation else None,
                "best_validation_loss": min((loss for _, loss in validation), default=None),
                "unit": self.task.unit,
                "units_per_second": median(f"{self.task.unit}_per_second"),
                "mfu": median("mfu"),
                "flop_count": FLOP_COUNT if self.task.flops_per_unit else None,
            },
            curves={key: self.log.curve(key) for key in ("loss", "validation_loss")},
        )

    def _write_record(self, step: int, status: str) -> None:
        if self.is_main:
            self._update_record(step, status)
            write_record(self.folder / "record.json", self.record)

    def _start_tracker(self) -> None:
        config = self.config
        if config.report_to == "none":
            return
        # One name for the life of the run: a resumed run goes on with its curve.
        name = f"{self.folder.name}-{self.record['run_id']}"
        self.accelerator.init_trackers(
            config.project,
            config={k: v for k, v in asdict(config).items() if v is not None},
            init_kwargs={
                "trackio": {"name": name, "resume": "allow"},
                "wandb": {"name": name, "id": name, "resume": "allow"},
            },
        )

    def _stop_requested(self, caught: list[int], step: int) -> int | None:
        """The signal to stop for, on all processes at the same step."""
        if self.world > 1:
            if step % min(10, self.config.log_every):  # agreeing waits for the device
                return None
            flag = torch.tensor(float(bool(caught)), device=self.accelerator.device)
            if not self.accelerator.reduce(flag, "sum"):
                return None
            return caught[0] if caught else signal.SIGTERM
        return caught[0] if caught else None

    def _shows_bar(self) -> bool:
        return self.is_main and sys.stderr.isatty()

    def _progress(self, start: int) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=start,
            desc="Training",
            unit="step",
            ncols=min(shutil.get_terminal_size().columns, 120),
            disable=not self._shows_bar(),
        )


class _Clock:
    """Tokens or images per second of training, without the time spent on evaluation and saving."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.units = 0

    def add(self, units: int) -> None:
        self.units += units

    def lap(self) -> float:
        now = time.perf_counter()
        rate = self.units / (now - self.start)
        self.start, self.units = now, 0
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps still under way belong to the time before
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, for the loop to act on between two steps; a second one acts at once."""
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, previous[number])
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for caught_number, handler in previous.items():
            signal.signal(caught_number, handler)


def _seed(*key: int) -> None:
    """Seeds torch, for dropout, from any number of integers."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]) >> 1)


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
