"""Finds the studies in `choosing.yaml` that apply to a model."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from ..family.names import GemSpec
from ..fit import match_eps
from ..surgery.audit import audit

_SMALL_SCALE = 0.3  # between the rms values in the studies, 0.16 and 0.55
_RESNETS = {"resnet", "cifar_resnet", "timm.models.resnet"}
_PLAIN_CNNS = {"gem_convnet", "timm.models.vgg"}
_GATED = ({"gate_proj", "up_proj"}, {"wi_0", "wi_1"}, {"w1", "w2", "w3"}, {"gate_up_proj"})


@cache
def _studies() -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("choosing.yaml").read_text(encoding="utf-8"))
    return found


def findings() -> list[dict[str, Any]]:
    """Returns the rows of `choosing.yaml`, with the keys kind, model, use (None if not known) and why."""
    rows: list[dict[str, Any]] = _studies()["findings"]
    return rows


def caveat() -> str:
    """Returns what holds for all rows of `choosing.yaml`."""
    text: str = _studies()["caveat"]
    return text


@dataclass(frozen=True)
class Profile:
    """The properties of a model that decide which studies apply.

    Attributes:
        model: Name of its class.
        kind: Its kind, as in `choosing.yaml`, or a kind that was not studied.
        activations: Names of the activations that run, as an audit lists them. Empty if the model does not run.
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
    def matched(self) -> str | None:
        """The E-GEM with n = 2 whose gate is half open at the rms, if the studies of this kind include it."""
        if self.rms is None or not any("matched" in row["why"] for row in self.findings):
            return None
        return GemSpec("egem", 2, match_eps(self.rms, 2)).name


def profile(model: nn.Module) -> Profile:
    """Returns the profile of a transformers or timm model, which may be on the meta device."""
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__module__
    width, rms = _scale(config)
    kind = "other (no study)"
    if family in _RESNETS:
        kind = "ResNet"
    elif family in _PLAIN_CNNS:
        kind = "plain CNN"
    elif family == "coordinate_mlp":
        kind = "physics-informed network"
    elif any(_has_gated_mlp(module) for module in model.modules()):
        kind = "transformer with gated MLPs (no study)"
    elif family == "bert":
        kind = "BERT"
    elif _generates_text(config) and rms is not None:
        kind = "small-scale transformer" if rms < _SMALL_SCALE else "transformer"
    return Profile(type(model).__name__, kind, _activations(model), width, rms)


def _activations(model: nn.Module) -> tuple[str, ...]:
    with contextlib.suppress(RuntimeError, ValueError):  # no inputs can be made up for it
        calls = audit(model).calls
        return tuple(dict.fromkeys(call.function for call in calls if call.kind in ("gem", "activation")))
    return ()


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
