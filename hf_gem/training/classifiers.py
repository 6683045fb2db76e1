"""Builds and loads image classifiers of transformers and timm by name, and replaces their activations."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import timm
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig
from transformers.activations import ACT2FN

from .. import convert, set_activation
from ..family.names import is_name
from ..files import shown
from ..surgery.kinds import activation_slots, describe, kind
from ..surgery.reports import path_patterns
from . import image_models  # noqa: F401  # registers its models
from .errors import ConfigError, reason


def depth_and_width(name: str) -> tuple[int, int] | None:
    """Parses resnet<6n+2>-cifar or resnet<6n+2>x<width>-cifar; returns None for any other name."""
    found = re.fullmatch(r"resnet(\d+)(?:x([1-9]\d*))?-cifar", name)
    return (int(found[1]), int(found[2] or 16)) if found else None


def is_own(name: str) -> bool:
    """Returns whether `image_models` defines a model of this name."""
    return name == "convnet" or depth_and_width(name) is not None


def class_names(classes: list[str]) -> dict[str, Any]:
    """Returns the fields of a transformers config that name the classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}


def new_classifier(name: str, hidden_act: str, classes: list[str]) -> PreTrainedModel:
    """Builds a model with new weights and the same activation everywhere.

    Args:
        name: timm/<name>, or the id or folder of a transformers image classifier. Its weights are not used.
        hidden_act: A name of the family, or an activation that transformers knows.
        classes: Names of the classes.

    Raises:
        ConfigError: There is no such model, or the activation does not reach every place.
    """
    ours = is_name(hidden_act)
    try:
        if name.startswith("timm/"):
            act: Any = {} if ours else {"model_args": {"act_layer": hidden_act}}
            config: Any = TimmWrapperConfig(architecture=name.removeprefix("timm/"), **act, **class_names(classes))
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **class_names(classes))
            if not ours:
                set_activation(config, hidden_act)
        model: PreTrainedModel = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except Exception as error:  # both libraries raise whatever their models do
        raise _cannot("build", name, error) from error
    if ours:
        print(replace_activations(model, name, hidden_act, fix="Choose another --model."))
    else:
        _check_is_everywhere(model, name, hidden_act)
    return model


def load_classifier(name: str, classes: list[str], new_head: bool) -> PreTrainedModel:
    """Loads a pretrained model in float32. It gets a new last layer if its number of classes differs from the data's.

    Args:
        name: timm/<name>, a Hub id, or the folder of an image classifier.
        classes: Names of the classes of the data.
        new_head: Whether to always start with a new last layer.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    names, how = class_names(classes), {"dtype": torch.float32, "trust_remote_code": False}
    try:
        model: PreTrainedModel = AutoModelForImageClassification.from_pretrained(name, **how)
        if model.config.num_labels != len(classes):
            resized: PreTrainedModel = AutoModelForImageClassification.from_pretrained(
                name, ignore_mismatched_sizes=True, **how, **names
            )
            return resized
        labels: Any = model.config.id2label
        theirs = [str(labels[number]) for number in range(len(classes))]
        if new_head:
            head = last_layer(model)
            for parameter in head.parameters():
                # While another thread builds a model, transformers patches torch.nn.init to skip marked parameters.
                vars(parameter).pop("_is_hf_initialized", None)
            head.reset_parameters()  # type: ignore[operator]  # both kinds of layer have it
        elif theirs != classes:
            print(
                f"{name} has as many classes as the data, but under other names ({theirs[0]!r} for {classes[0]!r}). "
                "Keeping its last layer, assuming the classes are the same in the same order; --new_head starts with a "
                "new one"
            )
        model.config.id2label, model.config.label2id = names["id2label"], names["label2id"]
        return model
    except Exception as error:  # the Hub client and the models raise their own
        raise _cannot("load", name, error) from error


def input_size(name: str) -> int | None:
    """Returns the image height and width that a timm or transformers model expects, or None if it does not say.

    Raises:
        ConfigError: There is no such model.
    """
    try:
        if name.startswith("timm/"):
            known = timm.get_pretrained_cfg(name.removeprefix("timm/"))
            return known.input_size[-1] if known else None
        size = getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "image_size", None)
    except Exception as error:  # timm and the Hub client raise their own
        raise _cannot("build", name, error) from error
    return size if isinstance(size, int) else None


def _cannot(do: str, name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot {do} --model {shown(name)}: {reason(error)}. It can be timm/<name>, a Hub id, or the folder of an "
        "image classifier. Check the name."
    )


def replace_activations(model: PreTrainedModel, name: str, hidden_act: str, fix: str, **how: Any) -> str:
    """Replaces the activations in place with `hf_gem.convert` and returns its report.

    Args:
        model: The model whose activations are all replaced.
        name: The name of the model in the recipe.
        hidden_act: A name of the family.
        fix: The last sentence of the error message: what to do if the conversion fails.
        how: Further arguments of `hf_gem.convert`.

    Raises:
        ConfigError: The model has no activation that can be replaced, or none can be fitted.
    """
    try:
        return str(convert(model, hidden_act, **how))
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ConfigError(f"cannot use --hidden_act {hidden_act} in --model {shown(name)}: {reason}. {fix}") from error


def last_layer(model: nn.Module) -> nn.Module:
    """Returns the last linear or convolutional layer."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def _check_is_everywhere(model: PreTrainedModel, name: str, hidden_act: str) -> None:
    """Checks that a stock activation is everywhere `hf_gem.convert` would put one of the family.

    Otherwise a run with the one and a run with the other would differ in more than the activation.
    """
    wanted = kind(ACT2FN[hidden_act])
    others = [slot for slot in activation_slots(model) if kind(slot.occupant) != wanted]
    if others:
        kinds = Counter(describe(slot.occupant) for slot in others)
        raise ConfigError(
            f"--hidden_act {hidden_act} does not reach {len(others)} activations of --model {shown(name)}: "
            f"{', '.join(f'{count} x {name}' for name, count in kinds.items())} at "
            f"{path_patterns([slot.path for slot in others])}. A name of the family would replace these too, so the "
            "runs would differ in more than the activation. Choose another --hidden_act, or a --model that uses it "
            "everywhere, such as resnet20-cifar or timm/resnet18."
        )
