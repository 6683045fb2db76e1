"""The training loop: pure-function batches and learning rates, exact normalisation, evaluation, checkpoints, logs."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from .checkpoint import CheckpointStore
from .clock import Clock
from .config import TrainConfig, trajectory
from .curve import LiveCurve
from .data.order import SampleOrder
from .device import batch_to_device, place_model
from .errors import ConfigError, DataError, Interrupted, TrainingError, reason
from .evaluate import evaluate
from .launch import layers_to_shard, start_tracker
from .loss import IGNORE
from .memory import checkpoint_gradients, fit_to_memory
from .optim import learning_rate, make_optimizer
from .progress import Progress, clock_time, headline
from .push import CheckpointPusher
from .record import MetricsLog, evaluation_record, hash_tensors, new_record, new_session, results, write_record
from .signals import agreed_stop, catch_signals
from .task import Task
from .throughput import peak_flops
from .trial import freeze_unused

_CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST),  # a file in place of a folder, or the other way round
)
_KEPT = ("run_id", "sessions", "samples_hash", "evaluation")  # fields of the record that checkpoints keep
_MOST_SKIPPED, _MOST_ROLLBACKS = 10, 3  # steps in a row; in a run


def train(task: Task, config: TrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """Starts a training run, or resumes one.

    The loss of a step is normalised by the number of targets in the global batch, and all randomness is seeded from
    (seed, step, micro-batch). A run is thus the same on any number of processes up to rounding, and bit for bit the
    same after a restart.

    Args:
        task: The model, objective and data.
        config: The config of the run.
        accelerator: An accelerator from `launch.make_accelerator`.

    Returns:
        The record of the run, which is also in `record.json` of the output folder. It is only complete on the main
        process.

    Raises:
        ConfigError: The processes cannot split the global batch evenly, or the output folder holds something else.
        CheckpointError: A checkpoint cannot be read or written.
        DataError: Samples cannot be read.
        TrainingError: A file cannot be written, or loss or gradient is not finite and `on_nonfinite` does not help.
        Interrupted: Ctrl-C or SIGTERM arrived. The state was saved.
    """
    folder = Path(config.output_dir)
    try:
        writes = _sole_writer(folder) if accelerator.is_main_process else contextlib.nullcontext()
        with writes, catch_signals():
            return _Run(task, config, accelerator).train()
    except OSError as error:
        inside = (
            error.filename is not None and folder.absolute() in Path(os.fsdecode(error.filename)).absolute().parents
        )
        if not inside and error.errno not in _CANNOT_WRITE:
            raise  # not about writing: a broken image, an unreachable tracker
        raise TrainingError(
            f"cannot write to {folder}: {error}. Complete checkpoints are still good. Free some space or name another "
            "--output_dir, and run the command again."
        ) from error
    finally:
        accelerator.end_training()


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Makes the output folder and locks it against other runs."""
    if (folder / "README.md").exists() and not (folder / "record.json").exists():
        raise ConfigError(f"{folder} holds a README.md that was not written by a run. Choose another --output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(f"another process is training in {folder}. Stop it or choose another --output_dir.") from None
    try:
        yield
    finally:
        lock.release()


class _Run:
    def __init__(self, task: Task, config: TrainConfig, accelerator: Accelerator) -> None:
        self.task, self.config, self.accelerator = task, config, accelerator
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.is_main = accelerator.is_main_process
        self.order = SampleOrder(len(task.train), config.data_seed)
        self.folder = Path(config.output_dir)
        self.log = MetricsLog(self.folder / "log.jsonl")
        self.picture = LiveCurve(self.folder / "loss_curve.png")
        self.saved = 0  # the newest saved step
        self.owes_evaluation = False  # whether a signal interrupted the evaluation at that step
        self.record = new_record(task, config, accelerator, self.order)
        sizes = self._prepare()
        self.micro_batch_size = sizes["micro_batch_size"]
        self.session = new_session(accelerator, sizes)
        decides = {**trajectory(config), "mixed_precision": accelerator.mixed_precision, "data_hash": task.data["hash"]}
        decides.update(task.identity)
        averaged, folder = getattr(self.ema, "module", None), self.folder / "checkpoints"
        self.checkpoints = CheckpointStore(folder, config.keep_checkpoints, decides, averaged)
        self.pusher: CheckpointPusher | None = None
        if self.is_main and config.push_to_hub and config.hub_strategy == "checkpoint":
            self.pusher = CheckpointPusher(config.push_to_hub, self.folder, private=not config.hub_public)

    def _prepare(self) -> dict[str, int]:
        """Moves model and optimizer to the device, and returns the sizes that fit into its memory."""
        task, config, accelerator = self.task, self.config, self.accelerator
        if config.gradient_checkpointing:
            checkpoint_gradients(task.model)
        if config.compile:
            task.objective.compile()
        if accelerator.is_fsdp2:
            layers: Any = layers_to_shard(task.model)
            task.objective._no_split_modules = layers  # accelerate reads from here what to shard as one unit
        else:
            place_model(task.objective, accelerator)  # before the optimizer is made, which is fused on a GPU
        sizes = fit_to_memory(task, config, accelerator)
        optimizer = make_optimizer(task.objective, config, task.lr_ratios)
        freeze_unused(task, config, accelerator, sizes["micro_batch_size"])
        self.objective, self.optimizer = accelerator.prepare(task.objective, optimizer)
        self.evaluated = task.objective  # without the DDP wrapper, which evaluation does not need
        self.ema: Any = None
        if config.ema_decay:
            from timm.utils.model_ema import ModelEmaV3

            tensors = [tensor.data_ptr() for tensor in task.objective.state_dict().values()]
            if len(set(tensors)) < len(tensors):
                raise ConfigError("this model has tied weights, and --ema_decay would average them twice. Set it to 0.")
            self.ema = ModelEmaV3(task.objective, decay=config.ema_decay)
            self.evaluated = self.ema.module
        return sizes

    def train(self) -> dict[str, Any]:
        steps = self.config.steps
        start, state = self.checkpoints.restore(self.accelerator, self.config.resume)
        self._take_up(start, state)
        if self.is_main and start < steps:
            self.session["first_step"] = start + 1
            self.record["sessions"].append(self.session)
            print(headline(self.record, self.session, self.accelerator.device, start), flush=True)
        self.began = time.perf_counter()
        # The name never changes, so a resumed run continues its curve.
        start_tracker(self.accelerator, self.config, f"{self.folder.name}-{self.record['run_id']}")
        owed = self.owes_evaluation
        if start == 0 or owed:
            self._evaluate(start)
        if start == steps and owed:
            self._save(start, "finished")
        self._write_record(start, "running" if start < steps else "finished")
        progress = Progress(self.accelerator, start, steps)
        with progress.bar, ThreadPoolExecutor(1, "loader") as self._loader:
            self._train(start, progress)
        self._collect_weights()
        if self.pusher is not None:
            self.pusher.wait()
        return self.record

    def _train(self, done: int, progress: Progress) -> None:
        config, steps = self.config, self.config.steps
        self.clock = Clock(self.accelerator.device)
        if done < steps:
            self._load(done)
        while done < steps:
            loss = self._step(done)
            done += 1
            self.clock.add(config.global_batch_size * self.task.units_per_sample)
            last = done == steps
            logs = last or done == 1 or done % config.log_every == 0
            saves = last or bool(config.save_every and done % config.save_every == 0)
            if (logs or saves) and self._has_to_go_back():
                done = self._roll_back(done, progress)
                continue
            if logs:
                self._log_step(done, loss, progress)
            progress.advance()
            if last or (config.eval_every and done % config.eval_every == 0):
                with self.clock.paused():
                    self._evaluate(done)
                if self._has_to_go_back():
                    done = self._roll_back(done, progress)
                    continue
            if saves:
                with self.clock.paused():
                    self._save(done, "finished" if last else "running")
            agrees = self.world == 1 or done % min(10, config.log_every) == 0  # agreeing waits for the device
            if not last and agrees and (number := agreed_stop(self.accelerator)):
                self._stop(done, number)

    def _stop(self, step: int, number: int) -> NoReturn:
        """Saves the state, unless it is already saved, and stops."""
        if step == 0:
            raise Interrupted("stopped before the first step; run the same command again to start over", number)
        if self.saved == step:
            self._write_record(step, "interrupted")
        else:
            self._save(step, "interrupted")
        raise Interrupted(
            f"stopped and saved at step {step} of {self.config.steps}; run the same command again to continue", number
        )

    def _take_up(self, step: int, state: Any) -> None:
        """Restores the state that was saved next to the weights of a checkpoint; None for a new run."""
        self.finite = torch.ones((), dtype=torch.bool, device=self.accelerator.device)
        self.skipped_in_a_row = 0
        self.saved = step
        self.owes_evaluation = bool(state and state.get("owes_evaluation"))
        if state is not None:
            self.record["nonfinite"] = dict(state["nonfinite"])
        if self.is_main:
            if state is not None:
                self.record.update({key: state[key] for key in _KEPT if key in state})
            self.log.start(state["log"] if state is not None else [])

    def _load(self, step: int) -> None:
        """Starts making the batches of a step in the background."""
        number = step + self.record["nonfinite"]["skipped_batches"]
        self._next: Future[list[dict[str, torch.Tensor]]] = self._loader.submit(self._batches, number)

    def _batches(self, number: int) -> list[dict[str, torch.Tensor]]:
        """Returns this process's share of a batch. Micro-batch k of rank r is slice k * world + r of it."""
        size = self.config.global_batch_size
        drawn = np.stack([self.order.batch(number, size), np.arange(number * size, (number + 1) * size)])
        mine = drawn.reshape(2, -1, self.world, self.micro_batch_size)[:, :, self.rank]
        batches = [self.task.train.batch(indices, draws) for indices, draws in mine.swapaxes(0, 1)]
        if number == 0 and self.is_main:
            self.record["samples_hash"] = hash_tensors(batches[0])
        return batches

    def _loaded(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Returns the batches of a step and starts loading those of the next."""
        try:
            with self.clock.waiting():
                batches = self._next.result()
        except Exception as error:  # each kind of data raises its own
            raise DataError(
                f"cannot read the samples of step {step + 1}: {reason(error)}. Complete checkpoints in "
                f"{self.checkpoints.folder} are good. Fix the data and run the same command again."
            ) from error
        if step + 1 < self.config.steps:
            self._load(step + 1)  # while the device computes this one
        return batches

    def _step(self, step: int) -> torch.Tensor:
        """Takes one optimizer step and returns the mean loss over the global batch."""
        config, accelerator = self.config, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(step, config)
        mean = self._backward(step, self._loaded(step))
        norm = accelerator.clip_grad_norm_(self.objective.parameters(), config.grad_clip or math.inf)
        finite = mean.isfinite()
        if accelerator.scaler is None:  # a scaler skips the step itself when a gradient overflows
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

    def _backward(self, step: int, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """Computes the gradients of the mean loss over the global batch, and returns this mean."""
        accelerator = self.accelerator
        mine_targets = float(sum((b["labels"] != IGNORE).sum() for b in batches))
        # It stays on the device, like the loss, so that nothing in a step waits for the device.
        num_targets = accelerator.reduce(torch.full((), mine_targets, device=accelerator.device), "sum")
        self.objective.train()
        total = torch.zeros((), device=accelerator.device)
        number = step + self.record["nonfinite"]["skipped_batches"]
        for k, batch in enumerate(batches):
            _seed(self.config.seed, number, k * self.world + self.rank)
            with contextlib.nullcontext() if k + 1 == len(batches) else accelerator.no_sync(self.objective):
                loss = self.objective(**batch_to_device(batch, accelerator.device)).loss
                # DDP and FSDP average over processes, but the loss is a sum over them.
                accelerator.backward(loss * (self.world / num_targets))
            total += loss.detach()
        mean: torch.Tensor = accelerator.reduce(total, "sum") / num_targets
        return mean

    def _skip(self, step: int) -> None:
        """Counts a step whose gradient is dropped. The learning rate and everything else advance."""
        self.record["nonfinite"]["skipped_steps"] += 1
        self.skipped_in_a_row += 1
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # it has seen these gradients and expects their step
        self.accelerator.print(f"step {step + 1}: loss or gradient is not finite, step skipped")
        if self.skipped_in_a_row == _MOST_SKIPPED:
            raise self._not_finite(step + 1, f"in {_MOST_SKIPPED} skipped steps in a row, up to step {step + 1}")

    def _has_to_go_back(self) -> bool:
        return self.config.on_nonfinite == "rollback" and not self._is_finite()

    def _roll_back(self, step: int, progress: Progress) -> int:
        """Returns to the newest checkpoint, and continues with the batches after those that led here."""
        before, sessions = self.record["nonfinite"], self.record["sessions"]
        if before["rollbacks"] == _MOST_ROLLBACKS or not self.checkpoints.complete():
            raise self._not_finite(step, f"after {before['rollbacks']} rollbacks, at or before step {step}")
        wait([self._next])  # it draws from the generators that are restored; its result, or error, is not needed
        start, state = self.checkpoints.restore(self.accelerator, "auto")
        self._take_up(start, state)
        counts = {"rollbacks": before["rollbacks"] + 1, "skipped_batches": before["skipped_batches"] + step - start}
        self.record.update(nonfinite={**before, **counts}, sessions=sessions)
        self.accelerator.print(
            f"loss or gradient is not finite at or before step {step}: going back to step {start} and skipping "
            f"{step - start} batches"
        )
        progress.go_back(start)
        if self.owes_evaluation:
            self._evaluate(start)
        self._load(start)
        return start

    def _not_finite(self, step: int, where: str) -> TrainingError:
        self._write_record(step, "diverged")
        return TrainingError(
            f"the loss or the gradient stopped being finite {where}. Nothing was saved since, and the checkpoints in "
            f"{self.checkpoints.folder} are good. Lower --learning_rate, raise --warmup_steps, train in "
            "--mixed_precision bf16 or no, or set --on_nonfinite."
        )

    def _evaluate(self, step: int) -> None:
        last = step == self.config.steps
        parts = {"validation": self.task.validation, "test": self.task.test if last else None}
        how = self.task.metrics, self.micro_batch_size, self.accelerator
        try:
            found = {part: evaluate(self.evaluated, data, *how) for part, data in parts.items() if data is not None}
        except Interrupted as stopped:
            self.owes_evaluation = True  # a resumed run starts with it
            self._stop(step, stopped.signal_number)
        self.owes_evaluation = False
        if self.is_main:
            named = {f"{part}_{name}": value for part, e in found.items() for name, value in e.values.items()}
            self.log.add(step=step, **named)
            for part, e in found.items():
                shown = ", ".join(f"{name} {value:.5g}" for name, value in e.values.items())
                tqdm.write(f"{clock_time()} step {step}: {part} {shown}")
            self.accelerator.log(named, step=step)
            self.record["evaluation"] = evaluation_record(self.task, found) if last else None
            if step and not last:  # the recipe draws the last one, with the unit of its loss
                self.picture.draw({**self.record, **results(self.log, self.task)})
        if step:  # the effect of the last update shows only here; only the main process has the values
            lost = not math.isfinite(found["validation"].values.get("loss", 0.0))
            self.finite &= self.accelerator.reduce(self.finite.new_full((), lost, dtype=torch.float32), "sum") == 0

    def _is_finite(self) -> bool:
        return bool(self.finite.item())  # waits for the device

    def _check_finite(self, step: int) -> None:
        if not self._is_finite():
            raise self._not_finite(step, f"at or before step {step}")

    def _log_step(self, step: int, loss: torch.Tensor, progress: Progress) -> None:
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
            shown = {"loss": f"{value:.5g}", f"{self.task.unit}/s": f"{rate:,.0f}"}
            if "mfu" in entry:
                shown["MFU"] = f"{entry['mfu']:.1%}"
            progress.show(step, shown)
        self.accelerator.log(entry, step=step)

    def _save(self, step: int, status: str) -> None:
        self._check_finite(step)
        self._update_record(step, status)
        state = {"log": self.log.entries, **{key: self.record[key] for key in ("nonfinite", *_KEPT)}}
        if self.owes_evaluation:
            state["owes_evaluation"] = True
        checkpoint = self.checkpoints.save(self.accelerator, step, state)
        self.saved = step
        if self.is_main:
            write_record(self.folder / "record.json", self.record)
        if self.pusher is not None:
            self.pusher.push(checkpoint)

    def _update_record(self, step: int, status: str) -> None:
        self.session.update(last_step=step, seconds=round(time.perf_counter() - self.began, 1))
        self.record.update(status=status, step=step, **results(self.log, self.task))

    def _write_record(self, step: int, status: str) -> None:
        if self.is_main:
            self._update_record(step, status)
            write_record(self.folder / "record.json", self.record)

    def _collect_weights(self) -> None:
        """Puts the evaluated weights into `task.model`: the averaged ones, or those gathered from all shards."""
        if self.ema is not None:
            self.task.model.load_state_dict(self.ema.module.model.state_dict())
        elif self.accelerator.is_fsdp2:
            state = self.accelerator.get_state_dict(self.objective)
            if self.is_main:
                model = self.task.model
                self.task.model = type(model)(model.config)
                weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
                self.task.model.load_state_dict(weights)


def _seed(*key: int) -> None:
    """Seeds torch from any number of integers, for dropout."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # without a GPU, manual_seed would store the whole stack as text at every step
        torch.default_generator.manual_seed(seed)
