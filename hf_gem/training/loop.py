"""The training loop: pure-function batches and learning rates, exact normalisation, evaluation, checkpoints, logs."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from tqdm.auto import tqdm

from .checkpoint import CheckpointStore
from .config import TrainConfig, trajectory
from .errors import ConfigError, TrainingError
from .loss import IGNORE
from .metrics import FLOP_COUNT, peak_flops
from .optim import adamw, learning_rate
from .order import SampleOrder
from .record import MetricsLog, environment, hash_tensors, write_record


class Samples(Protocol):
    """Data by index. Labels equal to `IGNORE` are not targets."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """The keyword arguments of the objective for some samples, `labels` among them."""
        ...


@dataclass
class Task:
    """What is trained on what.

    Attributes:
        name: The recipe, as it appears in the record.
        preset: The preset, likewise.
        model: What is saved at the end.
        objective: Wraps `model`; its forward takes a batch and returns the summed loss over all targets.
        train: Training samples.
        validation: Validation samples, all of which are evaluated.
        data_hash: Identifies the data.
        flops_per_token: Training FLOPs per input token, for the share of peak reported as MFU.
    """

    name: str
    preset: str
    model: nn.Module
    objective: nn.Module
    train: Samples
    validation: Samples
    data_hash: str
    flops_per_token: float | None = None


class Interrupted(TrainingError):
    """Stopped by Ctrl-C or SIGTERM, after a checkpoint."""


def make_accelerator(config: TrainConfig) -> Accelerator:
    """The accelerator of a run, with precision, trackers and determinism as configured."""
    torch.set_float32_matmul_precision("high")  # TF32 where there is any; no effect on a CPU
    if config.deterministic:
        torch.use_deterministic_algorithms(True)
    # On every save it reports that tied weights are stored once, which is what it is asked to do.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("--mixed_precision fp16 needs a CUDA device, and there is none; use bf16 or no")
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


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
        The record of the run, also in `record.json` of the output folder.

    Raises:
        ConfigError: the global batch does not divide into micro-batches and processes.
        CheckpointError: a checkpoint cannot be read or written.
        TrainingError: the loss is not finite.
        Interrupted: Ctrl-C or SIGTERM arrived; the state was saved.
    """
    return _Run(task, config, accelerator).train()


class _Run:
    def __init__(self, task: Task, config: TrainConfig, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        per_forward = config.micro_batch_size * self.world
        if config.global_batch_size % per_forward:
            raise ConfigError(
                f"--global_batch_size {config.global_batch_size} must be a multiple of --micro_batch_size "
                f"{config.micro_batch_size} x {self.world} processes = {per_forward}"
            )
        self.order = SampleOrder(len(task.train), config.data_seed)
        self.folder = Path(config.output_dir)
        self.log = MetricsLog(self.folder / "log.jsonl")
        self.record: dict[str, Any] = {
            "status": "running",
            "recipe": task.name,
            "preset": task.preset,
            "config": asdict(config),
            **environment(),
            "num_processes": self.world,
            "mixed_precision": accelerator.mixed_precision,
            "data_hash": task.data_hash,
            "init_hash": hash_tensors(task.model),
            "num_parameters": sum(p.numel() for p in task.model.parameters()),
            "num_train_samples": len(task.train),
            "num_validation_samples": len(task.validation),
        }
        if config.compile:
            task.objective.compile()
        self.objective, self.optimizer = accelerator.prepare(task.objective, adamw(task.objective, config))
        identity = {**trajectory(config), "data_hash": task.data_hash}
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", config.keep_checkpoints, identity)

    def train(self) -> dict[str, Any]:
        config, steps = self.config, self.config.steps
        start = self.checkpoints.restore(self.accelerator, config.resume)
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.log.resume(start)
        self._start_tracker()
        self._write_record(start)
        if start == 0:
            self._evaluate(0)
        saved = start
        clock = _Clock()
        with self._progress(start) as bar, _catch_signals() as caught:
            for step in range(start, steps):
                loss, tokens = self._step(step)
                clock.add(tokens)
                done = step + 1
                if done % config.log_every == 0 or done in (1, steps):
                    self._log_step(done, loss, clock, bar)
                bar.update()
                if done == steps or (config.eval_every and done % config.eval_every == 0):
                    with clock.paused():
                        self._evaluate(done)
                if done == steps or (config.save_every and done % config.save_every == 0):
                    with clock.paused():
                        self._save(done)
                    saved = done
                if self._stop_requested(caught, done):
                    if saved != done:
                        self._save(done)
                    self._write_record(done, status="interrupted")
                    raise Interrupted(f"stopped at step {done} of {steps}, saved; the same command goes on from there")
        self._write_record(steps, status="finished")
        self.accelerator.end_training()
        return self.record

    def _step(self, step: int) -> tuple[torch.Tensor, int]:
        """One optimizer step; returns the mean loss over the global batch and the input tokens or samples in it."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        # Micro-batch k of rank r is the (k * world + r)-th slice of the global batch, however many ranks there are.
        indices = self.order.batch(step, config.global_batch_size)
        mine = indices.reshape(-1, self.world, config.micro_batch_size)[:, self.rank]
        batches = [self.task.train.batch(part) for part in mine]
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
        if config.grad_clip:
            accelerator.clip_grad_norm_(self.objective.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mean: torch.Tensor = accelerator.reduce(total, "sum") / num_targets
        return mean, sum(batch["labels"].numel() for batch in batches) * self.world

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Mean loss over every target of the validation set, each counted once."""
        config, accelerator = self.config, self.accelerator
        self.objective.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        size = config.micro_batch_size
        count = len(self.task.validation)
        # Rounds of one batch per process, so that processes never wait for a collective that another has not reached.
        rounds = math.ceil(count / (size * self.world))
        for i in tqdm(range(rounds), desc="Evaluating", leave=False, disable=not self._shows_bar()):
            first = (i * self.world + self.rank) * size
            batch = self.task.validation.batch(np.arange(min(first, count), min(first + size, count)))
            if len(batch["labels"]):
                loss = self.objective(**_to(batch, accelerator.device))
                sums += torch.stack([loss.double().cpu(), (batch["labels"] != IGNORE).sum().double()])
        # float32 on devices without float64 would round the count: the two halves of a sum travel apart
        high = sums.float()
        low = (sums - high.double()).float()
        parts = accelerator.reduce(torch.stack([high, low]).to(accelerator.device), "sum").double().cpu()
        loss_sum, targets = (parts[0] + parts[1]).tolist()
        loss = loss_sum / targets
        if self.is_main:
            self.log.add(step=step, validation_loss=loss)
            tqdm.write(f"step {step}: validation loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.2f}")
        accelerator.log({"validation_loss": loss}, step=step)

    def _log_step(self, step: int, loss: torch.Tensor, clock: _Clock, bar: tqdm) -> None:
        value = loss.item()  # waits for the device, here only
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} at step {step}; the checkpoints before it are in {self.checkpoints.folder}. "
                "Lower --learning_rate, lengthen --warmup_steps or train in --mixed_precision bf16 or no"
            )
        rate = clock.lap()
        entry = {"loss": value, "learning_rate": learning_rate(step - 1, self.config), "tokens_per_second": rate}
        device = self.accelerator.device
        if self.task.flops_per_token and (peak := peak_flops(device)):
            entry["mfu"] = rate * self.task.flops_per_token / (peak * self.world)
        if device.type == "cuda":
            entry["max_memory_bytes"] = torch.cuda.max_memory_allocated(device)
        if self.is_main:
            self.log.add(step=step, **entry)
            shown = {"loss": f"{value:.4f}", "tokens/s": f"{rate:,.0f}"}
            if "mfu" in entry:
                shown["MFU"] = f"{entry['mfu']:.1%}"
            bar.set_postfix(shown, refresh=False)
            if not self._shows_bar():
                print(
                    f"step {step} of {self.config.steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()),
                    flush=True,
                )
        self.accelerator.log(entry, step=step)

    def _save(self, step: int) -> None:
        self.checkpoints.save(self.accelerator, step)
        self._write_record(step)

    def _write_record(self, step: int, status: str = "running") -> None:
        if not self.is_main:
            return
        validation = self.log.curve("validation_loss")
        rates = [rate for _, rate in self.log.curve("tokens_per_second")]
        self.record.update(
            status=status,
            step=step,
            result={
                "initial_validation_loss": validation[0][1] if validation else None,
                "validation_loss": validation[-1][1] if validation else None,
                "best_validation_loss": min((loss for _, loss in validation), default=None),
                "tokens_per_second": float(np.median(rates)) if rates else None,
                "flop_count": FLOP_COUNT if self.task.flops_per_token else None,
                "mfu": float(np.median(mfu)) if (mfu := [v for _, v in self.log.curve("mfu")]) else None,
            },
            curves={key: self.log.curve(key) for key in ("loss", "validation_loss")},
        )
        write_record(self.folder / "record.json", self.record)

    def _start_tracker(self) -> None:
        config = self.config
        if config.report_to == "none":
            return
        # One name for the life of the run: a resumed run goes on with its curve.
        name = self.folder.name
        self.accelerator.init_trackers(
            config.project,
            config={k: v for k, v in asdict(config).items() if v is not None},
            init_kwargs={
                "trackio": {"name": name, "resume": "allow"},
                "wandb": {"name": name, "id": name, "resume": "allow"},
            },
        )

    def _stop_requested(self, caught: list[int], step: int) -> bool:
        if self.world == 1:
            return bool(caught)
        if step % self.config.log_every:  # all have to agree, which costs a collective
            return False
        flag = torch.tensor(float(bool(caught)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum"))

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
    """Tokens per second of training, without the time spent on evaluation and saving."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.tokens = 0

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    def lap(self) -> float:
        now = time.perf_counter()
        rate = self.tokens / (now - self.start)
        self.start, self.tokens = now, 0
        return rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
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
