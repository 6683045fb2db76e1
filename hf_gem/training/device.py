"""Moving batches to a device, and the memory of the CPU."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, in malloc.h
_KEPT = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Keeps the memory that tensors free in this process, for the tensors of the next step, where malloc is glibc's.

    By default glibc returns large blocks to the system, which clears every page before it hands it out again. That is a
    fifth of the time of a step in the GPT-2 demo. Results do not change. The setting lasts as long as the process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for threshold in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(threshold, _KEPT)


def batch_to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """All tensors of a batch on a device; see `to_device`."""
    return {name: to_device(tensor, device) for name, tensor in batch.items()}


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; nobody waits for its copy to a GPU, and what is there already stays."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
