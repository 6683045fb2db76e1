"""Image classifiers of transformers and timm by name: new ones, pretrained ones, and their activations."""

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
from ..surgery.kinds import activation_slots, describe, kind
from ..surgery.reports import path_patterns
from . import image_models  # noqa: F401  # registers its models
from .errors import ConfigError


def depth_and_width(name: str) -> tuple[int, int] | None:
    """Of a residual network for CIFAR, resnet<6n+2>-cifar or resnet<6n+2>x<width>-cifar; None for another name."""
    found = re.fullmatch(r"resnet(\d+)(?:x([1-9]\d*))?-cifar", name)
    return (int(found[1]), int(found[2] or 16)) if found else None


def is_own(name: str) -> bool:
    """Whether this is a model of `image_models`."""
    return name == "convnet" or depth_and_width(name) is not None


def class_names(classes: list[str]) -> dict[str, Any]:
    """What a config of transformers says of the classes."""
    return {"id2label": dict(enumerate(classes)), "label2id": {name: number for number, name in enumerate(classes)}}


def new_classifier(name: str, hidden_act: str, classes: list[str]) -> PreTrainedModel:
    """A model with new weights and one activation everywhere.

    Args:
        name: timm/<name>, or the id or folder of an image classifier of transformers, whose weights are not used.
        hidden_act: Of the family, or one that transformers knows.
        classes: Their names.

    Raises:
        ConfigError: there is no such model, or the activation does not get everywhere.
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
        raise ConfigError(f"--model {name!r} cannot be built: {type(error).__name__}: {error}") from error
    if ours:
        print(replace_activations(model, name, hidden_act, fix="choose another --model"))
    else:
        _check_is_everywhere(model, name, hidden_act)
    return model


def load_classifier(name: str, classes: list[str], new_head: bool) -> PreTrainedModel:
    """A pretrained model in float32, with a new last layer where its classes are not as many as those of the data.

    Args:
        name: timm/<name>, a Hub id, or the folder of an image classifier.
        classes: Names of the classes of the data.
        new_head: Start with a new last layer in any case.

    Raises:
        ConfigError: it cannot be loaded.
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
                # Where another thread builds a model, transformers guards torch.nn.init and keeps what has this mark.
                vars(parameter).pop("_is_hf_initialized", None)
            head.reset_parameters()  # type: ignore[operator]  # both kinds of layer have it
        elif theirs != classes:
            print(
                f"{name} has as many classes as the data, with other names ({theirs[0]!r} for {classes[0]!r}); its "
                "last layer is kept, as if they were the same in the same order. --new_head starts with a new one"
            )
        model.config.id2label, model.config.label2id = names["id2label"], names["label2id"]
        return model
    except Exception as error:  # the Hub client and the models raise their own
        raise ConfigError(
            f"--model {name!r} cannot be loaded: {type(error).__name__}: {error}. It takes timm/<name>, a Hub id or "
            "the folder of an image classifier"
        ) from error


def input_size(name: str) -> int | None:
    """The height and width of the images that a model of timm or transformers is made for, where it says so.

    Raises:
        ConfigError: there is no such model.
    """
    if name.startswith("timm/"):
        known = timm.get_pretrained_cfg(name.removeprefix("timm/"))
        return known.input_size[-1] if known else None
    try:
        size = getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "image_size", None)
    except Exception as error:  # the Hub client raises its own
        raise ConfigError(f"--model {name!r} cannot be built: {type(error).__name__}: {error}") from error
    return size if isinstance(size, int) else None


def replace_activations(model: PreTrainedModel, name: str, hidden_act: str, fix: str, **how: Any) -> str:
    """Replaces the activations in place by `hf_gem.convert` and returns its report.

    Args:
        model: Of which all activations are replaced.
        name: Its name in the recipe.
        hidden_act: Of the family.
        fix: What to do where it is not possible.
        how: Further arguments of `hf_gem.convert`.

    Raises:
        ConfigError: there are none that can be replaced, or none can be fitted.
    """
    try:
        return str(convert(model, hidden_act, **how))
    except ValueError as error:
        raise ConfigError(f"--hidden_act {hidden_act} cannot go into --model {name!r}: {error}; {fix}") from error


def last_layer(model: nn.Module) -> nn.Module:
    """The last layer that has weights."""
    return [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]


def _check_is_everywhere(model: PreTrainedModel, name: str, hidden_act: str) -> None:
    """A stock activation has to be wherever `hf_gem.convert` puts one of the family, or two runs differ in more."""
    wanted = kind(ACT2FN[hidden_act])
    others = [slot for slot in activation_slots(model) if kind(slot.occupant) != wanted]
    if others:
        kinds = Counter(describe(slot.occupant) for slot in others)
        raise ConfigError(
            f"--hidden_act {hidden_act} does not reach {len(others)} activations of --model {name!r}, "
            f"{', '.join(f'{count} x {name}' for name, count in kinds.items())} at "
            f"{path_patterns([slot.path for slot in others])}, which a name of the family replaces: runs with the two "
            "would differ in more than the activation. Choose another --hidden_act, or a --model that takes it "
            "everywhere, such as resnet20-cifar or timm/resnet18"
        )
