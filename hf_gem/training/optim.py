"""Optimizer and learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..modules import GemActivation
from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over `warmup_steps`, then decay to `min_lr_ratio` of the peak at the last step, by `lr_schedule`.

    Args:
        step: Number of optimizer steps already taken, 0 for the first.
        config: The schedule.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices, which decay, and all else (biases, norms, parameters of activations), which does not."""
    activations = {p for m in model.modules() if isinstance(m, GemActivation) for p in m.parameters()}
    decay: list[nn.Parameter] = []
    keep: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and parameter not in activations else keep).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, in its fused form where all parameters are on a GPU."""
    return torch.optim.AdamW(
        parameter_groups(model, config.weight_decay),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=all(p.is_cuda for p in model.parameters()) or None,
    )
