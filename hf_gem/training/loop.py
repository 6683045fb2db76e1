"""The training loop: pure-function batches and learning rates, exact normalisation, evaluation, checkpoints, logs."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import logging
import math
import os
import secrets
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, gather_object
from filelock import FileLock, Timeout
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .checkpoint import CheckpointStore
from .config import TrainConfig, trajectory
from .data.order import SampleOrder
from .errors import ConfigError, DataError, Interrupted, TrainingError
from .loss import IGNORE
from .optim import learning_rate, make_optimizer
from .push import CheckpointPusher
from .record import MetricsLog, environment, hash_tensors, hash_weights, write_record
from .throughput import FLOP_COUNT, peak_flops

_CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),  # a file where a folder should be, or the other way round
)
_KEPT = ("run_id", "sessions", "samples_hash")  # of the record, in checkpoints
_MOST_SKIPPED = 10  # steps one after the other
_MOST_ROLLBACKS = 3  # in a run


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
        model: The model of transformers that is trained; at the end, all of its weights are here.
        objective: Of `loss`, with `model` as its attribute.
        train: Training samples.
        validation: Validation samples, all of which are evaluated.
        data: What the record says of the data; its `hash` identifies it.
        units_per_sample: How much of what throughput counts is in a sample: tokens, or 1 image.
        unit: What that is called.
        flops_per_unit: Training FLOPs for one, for the share of peak reported as MFU.
        metric: Of `evaluation.METRICS`, computed beside the loss.
        facts: What else the record says, as JSON.
        lr_ratios: Parts of the model whose learning rate is a multiple of the others'.
        identity: What has to be equal, besides config and data, for a checkpoint to be continued; as JSON.
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
    metric: str = "perplexity"
    facts: dict[str, Any] = field(default_factory=dict)
    lr_ratios: dict[nn.Module, float] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)


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
    if config.report_to == "auto":
        config.report_to = "trackio" if importlib.util.find_spec("trackio") else "none"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or several processes would each believe to be alone
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        # The loop accumulates by itself; what a launcher says about it would scale the gradients a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_") and not accelerator.is_fsdp2:
        raise ConfigError(
            f"these recipes run on one process, with DDP or with FSDP2, and the launcher chose {kind.value}"
            + (" version 1: give it fsdp_version: 2" if kind == DistributedType.FSDP else "")
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not accelerator.is_fsdp2 and accelerator.num_processes > 1:
        raise ConfigError(
            "the launcher chose FSDP, and accelerate shards on GPUs alone; use recipes/accelerate/cpu.yaml"
        )
    if accelerator.is_fsdp2 and config.ema_decay:
        raise ConfigError("--ema_decay keeps a whole copy of the weights, which FSDP2 shards; set it to 0, or use DDP")
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise ConfigError(
            f"--mixed_precision can be no, bf16 or fp16; the launcher chose {accelerator.mixed_precision}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"fp16 needs a CUDA device, and this is {accelerator.device}; use --mixed_precision bf16 or no"
        )
    if accelerator.is_fsdp2 and accelerator.mixed_precision != "no":
        # accelerate would reduce gradients, and round the summed loss, in the lower precision
        low = {"bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
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
        TrainingError: the loss or the gradient is not finite, and `on_nonfinite` has no answer, or a file cannot be
            written.
        Interrupted: Ctrl-C or SIGTERM arrived; the state was saved.
    """
    folder = Path(config.output_dir)
    try:
        with _sole_writer(folder) if accelerator.is_main_process else contextlib.nullcontext():
            return _Run(task, config, accelerator).train()
    except OSError as error:
        inside = (
            error.filename is not None and folder.absolute() in Path(os.fsdecode(error.filename)).absolute().parents
        )
        if not inside and error.errno not in _CANNOT_WRITE:
            raise  # a picture that is none, a tracker that is away
        raise TrainingError(
            f"cannot write to {folder}: {error}. Complete checkpoints are still good; make room, or name another "
            "--output_dir, and start the same command again"
        ) from error
    finally:
        accelerator.end_training()


@torch.no_grad()
def evaluate(objective: nn.Module, task: Task, batch_size: int, accelerator: Accelerator) -> dict[str, float]:
    """Loss and metric over the whole validation set, each target counted once.

    Args:
        objective: On the device of the accelerator, but not wrapped by it, except by FSDP.
        task: Whose validation samples and metric are used.
        batch_size: Samples in one forward pass of one process, at most.
        accelerator: All of whose processes call this.

    Returns:
        `loss` in nats and the metric; empty but on the main process.
    """
    objective.eval()
    world, rank, device = accelerator.num_processes, accelerator.process_index, accelerator.device
    if world > 1:
        for buffer in objective.buffers():  # statistics of batch normalisation, of which those of rank 0 are saved
            torch.distributed.broadcast(buffer, 0)
    count = len(task.validation)
    rows: dict[str, list[Any]] = {"losses": [], "targets": [], "predictions": [], "references": []}
    rounds = range(0, count, world * batch_size)  # as many on each process, for FSDP gathers weights in each
    hidden = not (accelerator.is_main_process and sys.stderr.isatty())
    for first in tqdm(rounds, desc="Evaluating", leave=False, disable=hidden):
        indices = np.arange(first + rank * batch_size, min(first + (rank + 1) * batch_size, count))
        try:
            batch = task.validation.batch(indices if len(indices) else np.zeros(1, np.int64))
        except Exception as error:  # whatever the data are made of
            raise DataError(f"validation samples cannot be read: {type(error).__name__}: {error}") from error
        output = objective(**_to(batch, device))
        if len(indices):
            rows["losses"].append(output.loss)
            rows["targets"].append((batch["labels"] != IGNORE).sum())
            if output.predictions is not None:
                rows["predictions"].extend(output.predictions.unbind())
                rows["references"].extend(batch["labels"].unbind())
    mine = {key: torch.stack(values).tolist() if values else [] for key, values in rows.items()}
    # Gathered here rather than through files, as evaluate would: machines need not share a folder for it.
    gathered = gather_object([mine]) if world > 1 else [mine]
    if not accelerator.is_main_process:
        return {}
    from .evaluate import METRICS  # evaluate takes seconds to import

    losses, targets, predictions, references = ([value for part in gathered for value in part[key]] for key in rows)
    metric = METRICS[task.metric](keep_in_memory=True)
    metric.add_batch(predictions=predictions or losses, references=references or targets)
    return {"loss": math.fsum(losses) / sum(targets), **metric.compute()}


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
        self.stop_file = os.environ.get("HF_GEM_STOP_FILE")
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
            **task.facts,
            "init_hash": hash_weights(task.model) if self.is_main else None,
            "init_signs_hash": hash_weights(task.model, signs=True) if self.is_main else None,
            "order_hash": self.order.hash(config.steps, config.global_batch_size),
            "samples_hash": None,  # of the first micro-batch as the model sees it, cropped, flipped and masked
            "num_parameters": sum(p.numel() for p in task.model.parameters()),
            "nonfinite": {"skipped_steps": 0, "rollbacks": 0, "skipped_batches": 0},
            "sessions": [],
        }
        if config.gradient_checkpointing:
            model: Any = task.model
            if not getattr(model, "supports_gradient_checkpointing", False):
                raise ConfigError(f"{type(model).__name__} has no --gradient_checkpointing; leave it out")
            enable = getattr(
                model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
            )  # newer name
            enable({"use_reentrant": False})
        if config.compile:
            task.objective.compile()
        if accelerator.is_fsdp2:
            task.objective._no_split_modules = _layers(task.model)  # where accelerate looks for what to shard as one
        else:
            task.objective.to(accelerator.device)  # before the optimizer, which is a fused one on a GPU
        self.objective, self.optimizer = accelerator.prepare(
            task.objective, make_optimizer(task.objective, config, task.lr_ratios)
        )
        self.evaluated = task.objective  # what DDP wraps, which is of no use in evaluation
        self.ema: Any = None
        if config.ema_decay:
            from timm.utils import ModelEmaV3

            tensors = [tensor.data_ptr() for tensor in task.objective.state_dict().values()]
            if len(set(tensors)) < len(tensors):
                raise ConfigError("--ema_decay would average tied weights twice, which this model has; set it to 0")
            self.ema = ModelEmaV3(task.objective, decay=config.ema_decay)
            self.evaluated = self.ema.module
            accelerator.register_for_checkpointing(self.ema)
        decides = {**trajectory(config), "mixed_precision": accelerator.mixed_precision, "data_hash": task.data["hash"]}
        decides.update(task.identity)
        self.pusher: CheckpointPusher | None = None
        if self.is_main and config.push_to_hub and config.hub_strategy == "checkpoint":
            self.pusher = CheckpointPusher(config.push_to_hub, self.folder, private=not config.hub_public)
        self.checkpoints = CheckpointStore(self.folder / "checkpoints", config.keep_checkpoints, decides)

    def train(self) -> dict[str, Any]:
        config, steps = self.config, self.config.steps
        start, state = self.checkpoints.restore(self.accelerator, config.resume)
        self._take_up(state)
        if self.is_main and start < steps:
            self.session["first_step"] = start + 1
            self.record["sessions"].append(self.session)
        self.began = time.perf_counter()
        self._start_tracker()
        if start == 0:
            self._evaluate(0)
        self._write_record(start, "running" if start < steps else "finished")
        with self._progress(start) as bar, _catch_signals() as caught, ThreadPoolExecutor(1, "loader") as self._loader:
            self._train(start, bar, caught)
        self._collect_weights()
        if self.pusher is not None:
            self.pusher.wait()
        return self.record

    def _train(self, start: int, bar: tqdm, caught: list[int]) -> None:
        config, steps = self.config, self.config.steps
        self.clock = clock = _Clock(self.accelerator.device)
        done = saved = start
        if start < steps:
            self._load(start)
        while done < steps:
            loss = self._step(done)
            done += 1
            clock.add(config.global_batch_size * self.task.units_per_sample)
            last = done == steps
            logs = last or done == 1 or done % config.log_every == 0
            saves = last or bool(config.save_every and done % config.save_every == 0)
            if (logs or saves) and self._has_to_go_back():
                done = saved = bar.n = self._roll_back(done)
                continue
            if logs:
                self._log_step(done, loss, bar)
            bar.update()
            if last or (config.eval_every and done % config.eval_every == 0):
                with clock.paused():
                    self._evaluate(done)
                if self._has_to_go_back():
                    done = saved = bar.n = self._roll_back(done)
                    continue
            if saves:
                with clock.paused():
                    self._save(done, "finished" if last else "running")
                saved = done
            if not last and (number := self._stop_requested(caught, done)):
                if saved == done:
                    self._write_record(done, "interrupted")
                else:
                    self._save(done, "interrupted")
                raise Interrupted(f"stopped at step {done} of {steps}, saved; the same command goes on", number)

    def _take_up(self, state: Any) -> None:
        """Goes on with what was saved beside the weights of a checkpoint; None for a new run."""
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self.skipped_in_a_row = 0
        if state is not None:
            self.record["nonfinite"] = dict(state["nonfinite"])
        if self.is_main:
            if state is not None:
                self.record.update({key: state[key] for key in _KEPT if key in state})
            self.log.start(state["log"] if state is not None else [])

    def _load(self, step: int) -> None:
        """Starts to make the batches of a step, beside whatever goes on."""
        self._next = self._loader.submit(self._batches, step + self.record["nonfinite"]["skipped_batches"])

    def _batches(self, number: int) -> list[dict[str, torch.Tensor]]:
        """This process's share of a batch. Micro-batch k of rank r is slice k * world + r of it."""
        size = self.config.global_batch_size
        drawn = np.stack([self.order.batch(number, size), np.arange(number * size, (number + 1) * size)])
        mine = drawn.reshape(2, -1, self.world, self.micro_batch_size)[:, :, self.rank]
        batches = [self.task.train.batch(indices, draws) for indices, draws in mine.swapaxes(0, 1)]
        if number == 0 and self.is_main:
            self.record["samples_hash"] = hash_tensors(batches[0])
        return batches

    def _step(self, step: int) -> torch.Tensor:
        """One optimizer step; returns the mean loss over the global batch."""
        config, accelerator, nonfinite = self.config, self.accelerator, self.record["nonfinite"]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(step, config)
        try:
            with self.clock.waiting():
                batches = self._next.result()
        except Exception as error:  # whatever the data are made of
            raise DataError(
                f"the samples of step {step + 1} cannot be read: {type(error).__name__}: {error}. Complete checkpoints "
                f"in {self.checkpoints.folder} are good; mend the data, and the same command goes on"
            ) from error
        if step + 1 < config.steps:
            self._load(step + 1)  # while the device computes this one
        mine_targets = float(sum((b["labels"] != IGNORE).sum() for b in batches))
        # It stays on the device, like the loss: nothing in a step waits for the device to catch up.
        num_targets = accelerator.reduce(torch.full((), mine_targets, device=accelerator.device), "sum")
        self.objective.train()
        total = torch.zeros((), device=accelerator.device)
        for k, batch in enumerate(batches):
            _seed(config.seed, step + nonfinite["skipped_batches"], k * self.world + self.rank)
            with contextlib.nullcontext() if k + 1 == len(batches) else accelerator.no_sync(self.objective):
                loss = self.objective(**_to(batch, accelerator.device)).loss
                # DDP and FSDP average over processes, and this is a sum over them
                accelerator.backward(loss * (self.world / num_targets))
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), config.grad_clip or math.inf)
        mean: torch.Tensor = accelerator.reduce(total, "sum") / num_targets
        finite = mean.isfinite()
        if accelerator.scaler is None:  # which skips the step when a gradient overflows
            finite &= (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()
        if config.on_nonfinite == "skip" and not finite.item():  # waits for the device
            self._skip(step)
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step()
            self.finite &= finite
            if self.ema is not None:
                self.ema.update(self.task.objective)
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _skip(self, step: int) -> None:
        """Counts a step whose gradient is thrown away, with the learning rate and all else going on."""
        self.record["nonfinite"]["skipped_steps"] += 1
        self.skipped_in_a_row += 1
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it has seen these gradients, and waits for their step
        self.accelerator.print(f"step {step + 1}: loss or gradient is not finite, skipped")
        if self.skipped_in_a_row == _MOST_SKIPPED:
            raise self._not_finite(step + 1, f"at {_MOST_SKIPPED} steps one after the other, all skipped,")

    def _has_to_go_back(self) -> bool:
        return self.config.on_nonfinite == "rollback" and not self._is_finite()

    def _roll_back(self, step: int) -> int:
        """Returns to the newest checkpoint, to go on with the batches behind those that led here."""
        before, sessions = self.record["nonfinite"], self.record["sessions"]
        if before["rollbacks"] == _MOST_ROLLBACKS or not self.checkpoints.complete():
            raise self._not_finite(step, f"after {before['rollbacks']} rollbacks, at or before step {step}")
        self._next.result()
        start, state = self.checkpoints.restore(self.accelerator, "auto")
        self._take_up(state)
        counts = {"rollbacks": before["rollbacks"] + 1, "skipped_batches": before["skipped_batches"] + step - start}
        self.record.update(nonfinite={**before, **counts}, sessions=sessions)
        self.accelerator.print(
            f"loss or gradient not finite at or before step {step}: back to step {start}, passing over "
            f"{step - start} batches"
        )
        self._load(start)
        return start

    def _not_finite(self, step: int, where: str) -> TrainingError:
        self._write_record(step, "diverged")
        return TrainingError(
            f"the loss or the gradient stopped being finite {where}; nothing was saved since, and the checkpoints in "
            f"{self.checkpoints.folder} are good. Lower --learning_rate, lengthen --warmup_steps, train in "
            "--mixed_precision bf16 or no, or choose what happens with --on_nonfinite"
        )

    def _evaluate(self, step: int) -> None:
        values = evaluate(self.evaluated, self.task, self.micro_batch_size, self.accelerator)
        if self.is_main:
            named = {f"validation_{name}": value for name, value in values.items()}
            self.log.add(step=step, **named)
            tqdm.write(f"step {step}: validation " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
            self.accelerator.log(named, step=step)
        if step:  # no step has seen yet what its own update did; only the main process has the values
            lost = torch.tensor(float(not math.isfinite(values.get("loss", 0.0))), device=self.accelerator.device)
            self.finite &= self.accelerator.reduce(lost, "sum") == 0

    def _is_finite(self) -> bool:
        return bool(self.finite.item())  # waits for the device, as do all who call this

    def _check_finite(self, step: int) -> None:
        if not self._is_finite():
            raise self._not_finite(step, f"at or before step {step}")

    def _log_step(self, step: int, loss: torch.Tensor, bar: tqdm) -> None:
        self._check_finite(step)
        value = loss.item()
        rate, data_wait = self.clock.lap()
        entry = {
            "loss": value,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            f"{self.task.unit}_per_second": rate,
            "data_wait": data_wait,
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
        state = {"log": self.log.entries, **{key: self.record[key] for key in ("nonfinite", *_KEPT)}}
        checkpoint = self.checkpoints.save(self.accelerator, step, state)
        if self.is_main:
            write_record(self.folder / "record.json", self.record)
        if self.pusher is not None:
            self.pusher.push(checkpoint)

    def _update_record(self, step: int, status: str) -> None:
        self.session.update(last_step=step, seconds=round(time.perf_counter() - self.began, 1))
        curves = {key: curve for key in self.log.keys("validation_") if (curve := self.log.curve(key))}
        losses = [loss for _, loss in curves.get("validation_loss", [])]
        finite = [loss for loss in losses if math.isfinite(loss)]

        def median(key: str) -> float | None:
            values = [value for _, value in self.log.curve(key)]
            return float(np.median(values)) if values else None

        self.record.update(
            status=status,
            step=step,
            result={
                "initial_validation_loss": losses[0] if losses else None,
                "best_validation_loss": min(finite, default=None),
                **{key: curve[-1][1] for key, curve in curves.items()},
                "unit": self.task.unit,
                "units_per_second": median(f"{self.task.unit}_per_second"),
                "mfu": median("mfu"),
                "data_wait": median("data_wait"),
                "flop_count": FLOP_COUNT if self.task.flops_per_unit else None,
            },
            curves={"loss": self.log.curve("loss"), **curves},
        )

    def _write_record(self, step: int, status: str) -> None:
        if self.is_main:
            self._update_record(step, status)
            write_record(self.folder / "record.json", self.record)

    def _collect_weights(self) -> None:
        """Puts into `task.model` what was evaluated: averaged weights, or whole ones where they are sharded."""
        if self.ema is not None:
            self.task.model.load_state_dict(self.ema.module.model.state_dict())
        elif self.accelerator.is_fsdp2:
            state = self.accelerator.get_state_dict(self.objective)
            if self.is_main:
                model = self.task.model
                self.task.model = type(model)(model.config)
                weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
                self.task.model.load_state_dict(weights)

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
        """The signal to stop for, on all processes at the same step.

        A file named by $HF_GEM_STOP_FILE stands for SIGTERM: launchers kill half a minute after they pass that on.
        """
        if self.stop_file and not caught and self.is_main and os.path.exists(self.stop_file):
            caught.append(signal.SIGTERM)
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
    """Tokens or images per second of training, and the share of time that it waited for data.

    The time spent on evaluation and saving does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = time.perf_counter()
        self.units = 0
        self.waited = 0.0

    def add(self, units: int) -> None:
        self.units += units

    def lap(self) -> tuple[float, float]:
        now = time.perf_counter()
        elapsed = now - self.start
        found = self.units / elapsed, self.waited / elapsed
        self.start, self.units, self.waited = now, 0, 0.0
        return found

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps still under way belong to the time before
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


@contextlib.contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, for the loop to act on between two steps; a second SIGINT acts at once.

    A second SIGTERM does not: launchers pass on the one that processes of their group have got already.
    """
    caught: list[int] = []
    previous: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if number == signal.SIGINT:
            signal.signal(number, previous[number])
            print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, handle)
    try:
        yield caught
    finally:
        for caught_number, handler in previous.items():
            signal.signal(caught_number, handler)


def _layers(model: nn.Module) -> Any:
    """What transformers does not split, of classes that repeat: embeddings may share weights with the head."""
    counts = Counter(type(module).__name__ for module in model.modules())
    return [name for name in getattr(model, "_no_split_modules", None) or [] if counts[name] > 1]


def _seed(*key: int) -> None:
    """Seeds torch, for dropout, from any number of integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # for a GPU that is not there it would keep the whole stack as text, at every step
        torch.default_generator.manual_seed(seed)


def _to(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; nobody waits for its copy to a GPU, and what is there already stays."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
