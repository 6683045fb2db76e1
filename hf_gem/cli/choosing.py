"""What studies say about the kind of model that a person has: the rows of `choosing.yaml` that apply."""

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

_SMALL_SCALE = 0.3  # rms between those of the studies: 0.16 and 0.55
_RESNETS = {"resnet", "cifar_resnet", "timm.models.resnet"}
_PLAIN_CNNS = {"gem_convnet", "timm.models.vgg"}
_GATED = ({"gate_proj", "up_proj"}, {"wi_0", "wi_1"}, {"w1", "w2", "w3"}, {"gate_up_proj"})


@cache
def findings() -> tuple[dict[str, Any], ...]:
    """The rows: kind, model, use or None for not known, and why."""
    import yaml

    path = Path(__file__).with_name("choosing.yaml")
    return tuple(yaml.safe_load(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Profile:
    """What decides which studies apply.

    Attributes:
        model: Its class.
        kind: As in the rows, or a kind of which there is no study.
        activations: Those that it has.
        width: Of a transformer.
        rms: Of what the activations of a new transformer are given.
    """

    model: str
    kind: str
    activations: tuple[str, ...]
    width: int | None = None
    rms: float | None = None

    @property
    def findings(self) -> list[dict[str, Any]]:
        """The rows of its kind."""
        return [row for row in findings() if row["kind"] == self.kind]

    @property
    def matched(self) -> list[str]:
        """E-GEM whose gate is half open at the rms, for n = 1 and 2."""
        if self.rms is None:
            return []
        return [GemSpec("egem", n, match_eps(self.rms, n)).name for n in (1, 2)]


def profile(model: nn.Module) -> Profile:
    """The profile of a model of transformers or timm, which may be on the meta device."""
    names = dict.fromkeys(describe(slot.occupant) for slot in activation_slots(model))
    activations = tuple(name for name in names if not is_gate(name))
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__module__
    width, rms = _scale(config)
    kind = "other, of which there is no study"
    if family in _RESNETS:
        kind = "ResNet"
    elif family in _PLAIN_CNNS:
        kind = "plain CNN"
    elif any(_has_gated_mlp(module) for module in model.modules()):
        kind = "transformer with gated MLPs, of which there is no study"
    elif family == "bert":
        kind = "BERT"
    elif _generates_text(config) and rms is not None:
        kind = "small-scale transformer" if rms < _SMALL_SCALE else "transformer"
    return Profile(type(model).__name__, kind, activations, width, rms)


def _scale(config: Any) -> tuple[int | None, float | None]:
    """Width, and rms of the inputs of activations at the start: behind a normalisation, weights of one std."""
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
