"""Finds what fits into the memory of a device, for micro-batches and logits whose option is `auto`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .config import TrainConfig
from .errors import ConfigError
from .launch import PRECISIONS
from .loss import CHUNK_SIZE, CausalLMLoss
from .task import Task
from .trial import try_step, without_trace

_SHARE_OF_LOGITS = 1 / 3  # of the memory without weights and optimizer; the rest is for activations
_SPARE = 0.05  # of all memory, for a compiler's buffers, kernels and fragmentation
_MICRO_BATCH_SIZE = 16  # if no size is tried out


def checkpoint_gradients(model: Any) -> None:
    """Makes a model recompute its activations in the backward pass, or raises ConfigError."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"got --gradient_checkpointing with a {type(model).__name__}. This model does not support it. Leave it out."
        )
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # newer name
    enable({"use_reentrant": False})


def fixed_micro_batch_size(config: TrainConfig) -> int:
    """Returns the configured micro-batch size. For `auto` it is that of a CPU, where no size is tried out."""
    return _MICRO_BATCH_SIZE if config.micro_batch_size == "auto" else config.micro_batch_size


def auto_chunk_size(available: int, batch: int, length: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Chooses the `chunk_size` of `chunked_cross_entropy`, with chunks only if memory requires them.

    Chunks compute the head twice. They are not used if all logits, their float32 copy and its gradient take at most a
    third of the available memory.

    Args:
        available: Bytes left by weights, gradients and optimizer state.
        batch: Samples in a micro-batch.
        length: Tokens in a sample.
        vocabulary: Number of logits per token.
        dtype: Dtype in which the head computes the logits.
    """
    logits = batch * length * vocabulary * (dtype.itemsize + 4 + 4)
    return 0 if logits <= available * _SHARE_OF_LOGITS else CHUNK_SIZE


def largest_micro_batch(sizes: Sequence[int], peak: Callable[[int], int], memory: int) -> int:
    """Finds the largest size of a micro-batch that fits into memory, or 0.

    Two small tries measure what a sample takes, so that the first large try is close.

    Args:
        sizes: The possible sizes, the largest first.
        peak: Returns the peak memory, in bytes, of a forward and backward pass on a number of samples, or raises
            torch.OutOfMemoryError.
        memory: Total number of bytes.
    """
    try:
        few, more = peak(2), peak(4)
        estimate = 4 + (memory - more) // max((more - few) // 2, 1)
    except torch.OutOfMemoryError:
        estimate = 3
    for size in sizes:
        if size <= max(estimate, sizes[-1]):
            try:
                peak(size)
                return size
            except torch.OutOfMemoryError:
                continue
    return 0


def fit_to_memory(task: Task, config: TrainConfig, accelerator: Accelerator) -> dict[str, int]:
    """Replaces `auto` sizes by numbers, and returns them for the record. All processes must call it.

    The tries are not compiled. A size that fits eagerly also fits when compiled, and each size would need a new
    compilation.

    Args:
        task: The task. Its objective is on the device, unless it will be sharded.
        config: The config of the run.
        accelerator: The accelerator of the run.

    Raises:
        ConfigError: The processes cannot split the batch evenly, or nothing fits.
    """
    if config.global_batch_size % accelerator.num_processes:
        raise ConfigError(
            f"got --global_batch_size {config.global_batch_size} on {accelerator.num_processes} processes. It must be "
            f"a multiple of {accelerator.num_processes}. Change it, or the number of processes."
        )
    share = config.global_batch_size // accelerator.num_processes
    tries = config.micro_batch_size == "auto" and accelerator.device.type == "cuda"
    multiple = getattr(task.objective, "multiple_of", 1)
    sizes = [n for n in range(share, 0, -1) if share % n == 0 and n % multiple == 0]
    size = next((n for n in sizes if n <= fixed_micro_batch_size(config)), None)
    if size is None:
        raise ConfigError(
            f"got micro-batches of at most {min(share, fixed_micro_batch_size(config))} of the {share} samples of a "
            f"process. Their number must divide {share} and be a multiple of {multiple}, as the objective needs "
            "(Mixup and CutMix need pairs). Change --global_batch_size or --micro_batch_size."
        )
    found = {}
    if isinstance(task.objective, CausalLMLoss):
        if task.objective.chunk_size == "auto":
            # Chunks compute the head twice, which no larger micro-batch repays; a try shows what fits without them.
            task.objective.chunk_size = _chunk_size(task, config, accelerator, 1 if tries else size)
        found["loss_chunk_size"] = task.objective.chunk_size
    if tries:
        size = _tried_micro_batch(sizes, task, config, accelerator)
    return {"micro_batch_size": size, **found}


def _chunk_size(task: Task, config: TrainConfig, accelerator: Accelerator, batch: int) -> int:
    if accelerator.device.type != "cuda":
        return CHUNK_SIZE
    # Total memory rather than free memory, so that a resumed run makes the same choice.
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
    """Returns the bytes of the optimizer state and of averaged weights."""
    return weights * ((2 if config.optimizer == "adamw" else 1) + bool(config.ema_decay))


def _tried_micro_batch(sizes: Sequence[int], task: Task, config: TrainConfig, accelerator: Accelerator) -> int:
    """Finds the largest micro-batch that fits on every process. The tries leave no trace."""
    device = accelerator.device
    if accelerator.is_fsdp2:
        raise ConfigError(
            "got --micro_batch_size auto with FSDP2. Its processes wait for each other in every try. Give a number."
        )
    free, total = torch.cuda.mem_get_info(device)
    memory = free + torch.cuda.memory_reserved(device)
    with without_trace(task.objective, device):
        # Stands in for the memory that training takes besides a step.
        kept = _state_bytes(_weight_bytes(task.model), config) + int(total * _SPARE)
        stand_in = torch.empty(min(kept, free), dtype=torch.uint8, device=device)
        size = largest_micro_batch(sizes, lambda size: _peak_bytes(task, accelerator, size), memory)
        del stand_in
    torch.cuda.empty_cache()
    size = int(accelerator.gather(torch.tensor([size], device=device)).min())
    if size == 0:
        raise ConfigError(
            f"not even one sample fits into the memory of {torch.cuda.get_device_name(device)}. Use "
            "--gradient_checkpointing true, a smaller model, or FSDP2 with a --micro_batch_size."
        )
    accelerator.print(f"micro-batches of {size} samples fit into memory")
    return size


def _peak_bytes(task: Task, accelerator: Accelerator, size: int) -> int:
    """Returns the peak memory of a forward and backward pass on some samples."""
    device = accelerator.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        try_step(task, accelerator, np.arange(size) % len(task.train))
        return torch.cuda.max_memory_allocated(device)
    finally:
        task.objective.zero_grad(set_to_none=True)
