"""Moves models and batches to a device, and tunes memory allocation on the CPU."""

from __future__ import annotations

import ctypes
import sys

import torch
from accelerate import Accelerator
from torch import nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep freed memory for the tensors of the next step. It does nothing with another malloc.

    By default glibc returns large blocks to the system, and the system clears every page before handing it out again.
    That takes a fifth of the time of a step in the GPT-2 demo. Results do not change. The setting lasts as long as the
    process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _KEPT)


def place_model(model: nn.Module, accelerator: Accelerator) -> None:
    """Moves a model to the accelerator's device, in the layout that suits its convolutions.

    In half precision on a GPU, the filters of 2D convolutions become channels-last, and so do the images between them.
    On a CPU they stay as they are: small images take longer in the other layout, and Conv2d(4, 8, 1, stride=2) in torch
    2.14 then corrupts the heap.
    """
    model.to(accelerator.device)
    if accelerator.device.type == "cuda" and accelerator.mixed_precision != "no":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)


def batch_to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Moves all tensors of a batch to a device; see `to_device`."""
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Moves a tensor to a device. The copy to a GPU is asynchronous, and a tensor that is already there is kept."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
