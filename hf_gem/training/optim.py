"""Optimizer and learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..modules import GemActivation
from .config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Computes the learning rate: linear warm-up over `warmup_steps`, then decay by `lr_schedule`.

    `cosine` and `linear` reach `min_lr_ratio` times the peak at the last step. `step` divides the peak by 10 after half
    of all steps and by 100 after three quarters, as in He et al. 2016 (arXiv 1512.03385, section 4.2).

    Args:
        step: Number of optimizer steps already taken, 0 for the first.
        config: The config with the schedule.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "step":
        return config.learning_rate * 0.1 ** ((2 * step >= config.steps) + (4 * step >= 3 * config.steps))
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return config.learning_rate * (config.min_lr_ratio + (1 - config.min_lr_ratio) * left)


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_ratios: Mapping[nn.Module, float] | None = None
) -> list[dict[str, Any]]:
    """Groups parameters for weight decay: matrices and filters decay; biases, norms and activations do not.

    Args:
        model: The model with the parameters.
        weight_decay: Weight decay of matrices and filters.
        lr_ratios: Parts of the model whose learning rate is a multiple of the usual one. They get separate groups, with
            the multiple stored as `lr_ratio`.
    """
    activations = {p for m in model.modules() if isinstance(m, GemActivation) for p in m.parameters()}
    ratios = {p: ratio for module, ratio in (lr_ratios or {}).items() for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {(1.0, weight_decay): [], (1.0, 0.0): []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and parameter not in activations
            key = ratios.get(parameter, 1.0), weight_decay if decays else 0.0
            groups.setdefault(key, []).append(parameter)
    return [{"params": part, "weight_decay": decay, "lr_ratio": ratio} for (ratio, decay), part in groups.items()]


def make_optimizer(
    model: nn.Module, config: TrainConfig, lr_ratios: Mapping[nn.Module, float] | None = None
) -> torch.optim.Optimizer:
    """Makes AdamW, or SGD with momentum, over `parameter_groups`. It is fused if all parameters are on a GPU."""
    groups = parameter_groups(model, config.weight_decay, lr_ratios)
    fused = all(p.is_cuda for p in model.parameters()) or None
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=fused)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_eps, fused=fused)
