"""Finds the studies in `choosing.yaml` that apply to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..family.names import GemSpec
from ..fit import match_eps
from ..surgery.kinds import activation_slots, describe, is_gate

_SMALL_SCALE = 0.3  # between the rms values in the studies, 0.16 and 0.55
_RESNETS = {"resnet", "cifar_resnet", "timm.models.resnet"}
_PLAIN_CNNS = {"gem_convnet", "timm.models.vgg"}
_GATED = ({"gate_proj", "up_proj"}, {"wi_0", "wi_1"}, {"w1", "w2", "w3"}, {"gate_up_proj"})


@cache
def findings() -> tuple[dict[str, Any], ...]:
    """Returns the rows of `choosing.yaml`, with the keys kind, model, use (None if not known) and why."""
    import yaml

    path = Path(__file__).with_name("choosing.yaml")
    return tuple(yaml.safe_load(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Profile:
    """The properties of a model that decide which studies apply.

    Attributes:
        model: Name of its class.
        kind: Its kind, as in `choosing.yaml`, or a kind that was not studied.
        activations: Names of its activations.
        width: Hidden size, for a transformer.
        rms: Root mean square of the inputs of activations, for a transformer before training.
    """

    model: str
    kind: str
    activations: tuple[str, ...]
    width: int | None = None
    rms: float | None = None

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The rows of `choosing.yaml` for this kind."""
        return [row for row in findings() if row["kind"] == self.kind]

    @property
    def matched(self) -> list[str]:
        """Names of the E-GEM members whose gate is half open at the rms, for n = 1 and 2."""
        if self.rms is None:
            return []
        return [GemSpec("egem", n, match_eps(self.rms, n)).name for n in (1, 2)]


def profile(model: nn.Module) -> Profile:
    """Returns the profile of a transformers or timm model, which may be on the meta device."""
    names = dict.fromkeys(describe(slot.occupant) for slot in activation_slots(model))
    activations = tuple(name for name in names if not is_gate(name))
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__module__
    width, rms = _scale(config)
    kind = "other (no study)"
    if family in _RESNETS:
        kind = "ResNet"
    elif family in _PLAIN_CNNS:
        kind = "plain CNN"
    elif any(_has_gated_mlp(module) for module in model.modules()):
        kind = "transformer with gated MLPs (no study)"
    elif family == "bert":
        kind = "BERT"
    elif _generates_text(config) and rms is not None:
        kind = "small-scale transformer" if rms < _SMALL_SCALE else "transformer"
    return Profile(type(model).__name__, kind, activations, width, rms)


def _scale(config: Any) -> tuple[int | None, float | None]:
    """Returns the width, and the rms of activation inputs before training: a normalisation, then weights of one std."""
    width, std = getattr(config, "hidden_size", None), getattr(config, "initializer_range", None)
    if not isinstance(width, int) or not isinstance(std, float):
        return None, None
    return width, std * math.sqrt(width)


def _has_gated_mlp(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    return any(gated <= names for gated in _GATED)


def _generates_text(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(config, "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
