"""Tries a forward and backward pass before training, without leaving a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .._torch import without_compiler
from .config import TrainConfig
from .data.order import SampleOrder
from .device import batch_to_device
from .task import Task


@contextlib.contextmanager
def without_trace(objective: nn.Module, device: torch.device) -> Iterator[None]:
    """Restores statistics, random states, gradients and training mode after a `with` block. Nothing compiles there."""
    objective.train()
    buffers = {name: buffer.clone() for name, buffer in objective.named_buffers()}  # statistics
    with torch.random.fork_rng([device] if device.type == "cuda" else []), without_compiler():
        yield
    objective.train()
    objective.zero_grad(set_to_none=True)
    for name, buffer in objective.named_buffers():
        buffer.copy_(buffers[name])


def try_step(task: Task, accelerator: Accelerator, indices: np.ndarray) -> None:
    """Runs a forward and backward pass on some training samples."""
    batch = task.train.batch(indices, np.arange(len(indices)))
    with accelerator.autocast():
        loss = task.objective(**batch_to_device(batch, accelerator.device)).loss
    loss.backward()


def freeze_unused(task: Task, config: TrainConfig, accelerator: Accelerator, micro_batch_size: int) -> None:
    """Freezes parameters that the loss does not use, such as the mask token of a classifier, if the run uses DDP.

    DDP would wait for their gradients in vain. They get no update in any case. Call it after the optimizer is made, so
    that the optimizer has the same parameters on any number of processes.

    Args:
        task: The task. Its objective is on the device.
        config: The config of the run.
        accelerator: The accelerator of the run.
        micro_batch_size: Number of samples in a micro-batch. The try uses at most two.
    """
    if accelerator.num_processes == 1 or accelerator.is_fsdp2:
        return
    # The same samples on all processes, so that they agree.
    indices = SampleOrder(len(task.train), config.data_seed).batch(0, min(2, micro_batch_size))
    with without_trace(task.objective, accelerator.device):
        for training in (True, False):  # some layers are skipped at random in training, and some heads only run there
            task.objective.train(training)
            try_step(task, accelerator, indices)
        unused = {name: p for name, p in task.objective.named_parameters() if p.grad is None and p.requires_grad}
    for parameter in unused.values():
        parameter.requires_grad_(False)
    if unused and accelerator.is_main_process:
        print(f"The loss does not use {', '.join(sorted(unused))}. Not trained.")
