"""What fits into the memory of a device: micro-batches, logits, and what `auto` stands for in their options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .._torch import without_compiler
from .config import TrainConfig
from .device import batch_to_device
from .errors import ConfigError
from .launch import PRECISIONS
from .loss import CHUNK_SIZE, CausalLMLoss
from .task import Task

_SHARE_OF_LOGITS = 1 / 3  # of the memory beside weights and optimizer; the rest is for activations
_SPARE = 0.05  # of all memory: a compiler's buffers, kernels, fragments
_MICRO_BATCH_SIZE = 16  # where nothing is tried


def checkpoint_gradients(model: Any) -> None:
    """Lets a model compute its activations again in the backward pass, or raises ConfigError."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(model).__name__} has no --gradient_checkpointing; leave it out")
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # newer name
    enable({"use_reentrant": False})


def fixed_micro_batch_size(config: TrainConfig) -> int:
    """The configured micro-batch size; for `auto`, that of a CPU, where nothing is tried."""
    return _MICRO_BATCH_SIZE if config.micro_batch_size == "auto" else config.micro_batch_size


def auto_chunk_size(available: int, batch: int, length: int, vocabulary: int, dtype: torch.dtype) -> int:
    """The `chunk_size` of `chunked_cross_entropy` that saves no more memory than has to be saved.

    Chunks compute the head twice, so there are none where all logits, their float32 copy and its gradient take at most
    a third of the memory.

    Args:
        available: Bytes beside weights, gradients and optimizer state.
        batch: Samples in a micro-batch.
        length: Tokens in a sample.
        vocabulary: Logits of a token.
        dtype: Of the logits as the head computes them.
    """
    logits = batch * length * vocabulary * (dtype.itemsize + 4 + 4)
    return 0 if logits <= available * _SHARE_OF_LOGITS else CHUNK_SIZE


def largest_micro_batch(share: int, peak: Callable[[int], int], memory: int) -> int:
    """The largest divisor of a process's share of a batch that fits, or 0.

    Two small tries tell what a sample takes, so that the first large one is close.

    Args:
        share: Samples.
        peak: Bytes that a forward and backward pass on some samples takes at most, or torch.OutOfMemoryError.
        memory: Bytes in all.
    """
    try:
        few, more = peak(2), peak(4)
        estimate = 4 + (memory - more) // max((more - few) // 2, 1)
    except torch.OutOfMemoryError:
        estimate = 3
    for size in range(min(share, max(estimate, 1)), 0, -1):
        if share % size == 0:
            try:
                peak(size)
                return size
            except torch.OutOfMemoryError:
                continue
    return 0


def fit_to_memory(task: Task, config: TrainConfig, accelerator: Accelerator) -> dict[str, int]:
    """What `auto` stands for, which the session has on record; the objective gets its part of it.

    Tries are not compiled: what runs eagerly fits when it is compiled too, and each size would be compiled anew.

    Args:
        task: Its objective is on the device, unless it is to be sharded.
        config: Of the run.
        accelerator: All of whose processes call this.

    Raises:
        ConfigError: the batch does not divide among the processes, or nothing fits.
    """
    if config.global_batch_size % accelerator.num_processes:
        raise ConfigError(
            f"--global_batch_size {config.global_batch_size} must be a multiple of the {accelerator.num_processes} "
            "processes"
        )
    share = config.global_batch_size // accelerator.num_processes
    tries = config.micro_batch_size == "auto" and accelerator.device.type == "cuda"
    size = next(n for n in range(min(share, fixed_micro_batch_size(config)), 0, -1) if share % n == 0)
    found = {}
    if isinstance(task.objective, CausalLMLoss):
        if task.objective.chunk_size == "auto":
            # No micro-batch is worth the second head that chunks cost; a try shows what fits without them.
            task.objective.chunk_size = _chunk_size(task, config, accelerator, 1 if tries else size)
        found["loss_chunk_size"] = task.objective.chunk_size
    if tries:
        size = _tried_micro_batch(share, task, config, accelerator)
    return {"micro_batch_size": size, **found}


def _chunk_size(task: Task, config: TrainConfig, accelerator: Accelerator, batch: int) -> int:
    if accelerator.device.type != "cuda":
        return CHUNK_SIZE
    # All memory rather than what is free now: a run that goes on later takes the same choice.
    _, memory = torch.cuda.mem_get_info(accelerator.device)
    shards = accelerator.num_processes if accelerator.is_fsdp2 else 1
    weights = _weight_bytes(task.model)
    available = memory - (2 * weights + _state_bytes(weights, config)) // shards
    model: Any = task.model
    dtype = PRECISIONS[accelerator.mixed_precision]
    return auto_chunk_size(available, batch, task.units_per_sample, model.config.vocab_size, dtype)


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _state_bytes(weights: int, config: TrainConfig) -> int:
    """What the optimizer keeps from its first step on, and averaged weights."""
    return weights * ((2 if config.optimizer == "adamw" else 1) + bool(config.ema_decay))


def _tried_micro_batch(share: int, task: Task, config: TrainConfig, accelerator: Accelerator) -> int:
    """The largest micro-batch that fits on every process; nothing of the tries stays."""
    device = accelerator.device
    if accelerator.is_fsdp2:
        raise ConfigError(
            "--micro_batch_size auto is not for FSDP2, whose processes wait for each other in every try; give a number"
        )
    task.objective.train()
    buffers = {name: buffer.clone() for name, buffer in task.objective.named_buffers()}  # statistics
    free, total = torch.cuda.mem_get_info(device)
    memory = free + torch.cuda.memory_reserved(device)
    with torch.random.fork_rng([device]), without_compiler():
        # Stands for what there will be beside a step.
        kept = _state_bytes(_weight_bytes(task.model), config) + int(total * _SPARE)
        stand_in = torch.empty(min(kept, free), dtype=torch.uint8, device=device)
        size = largest_micro_batch(share, lambda size: _peak_bytes(task, accelerator, size), memory)
        del stand_in
    for name, buffer in task.objective.named_buffers():
        buffer.copy_(buffers[name])
    torch.cuda.empty_cache()
    size = int(accelerator.gather(torch.tensor([size], device=device)).min())
    if size == 0:
        raise ConfigError(
            f"not one sample fits into the memory of {torch.cuda.get_device_name(device)}; use "
            "--gradient_checkpointing true, a smaller model, or FSDP2 with a --micro_batch_size"
        )
    accelerator.print(f"micro-batches of {size} samples fit into memory")
    return size


def _peak_bytes(task: Task, accelerator: Accelerator, size: int) -> int:
    """Peak of the memory that a forward and backward pass on some samples takes."""
    device = accelerator.device
    batch = task.train.batch(np.arange(size) % len(task.train), np.arange(size))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with accelerator.autocast():
            loss = task.objective(**batch_to_device(batch, device)).loss
        loss.backward()
        return torch.cuda.max_memory_allocated(device)
    finally:
        task.objective.zero_grad(set_to_none=True)
