"""Trains image classifiers from scratch with any activation: accelerate launch recipes/vision_train.py --preset demo"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig
from transformers.activations import ACT2FN

import hf_gem
from hf_gem.family.names import is_name
from hf_gem.surgery.kinds import describe, is_elementwise, is_gate, kind, stock_slots
from hf_gem.surgery.reports import path_patterns
from hf_gem.training.config import TrainConfig, option, parse_config, require
from hf_gem.training.data.vision import ImageData, Preprocessing, VisionConfig, image_processor, prepare_images
from hf_gem.training.errors import ConfigError, run_recipe
from hf_gem.training.image_models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    ConvNetConfig,
    ConvNetForImageClassification,
)
from hf_gem.training.loop import Task, make_accelerator, train
from hf_gem.training.loss import ClassificationLoss
from hf_gem.training.report import image_card, import_of, print_summary, save_results

TEMPLATE = Path(__file__).resolve().parent.parent / "model_cards" / "template.md"
_CIFAR_RESNET = r"resnet(\d+)-cifar"

# He et al. 2016, section 4.2: 64k iterations, the learning rate divided by 10 at 32k and 48k.
_CIFAR: dict[str, Any] = {
    "model": "resnet56-cifar", "validation_split": "test", "crop_padding": 4, "flip": True,
    "optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "grad_clip": 0,
    "lr_schedule": "step", "warmup_steps": 0, "steps": 64_000, "global_batch_size": 128, "micro_batch_size": 128,
    "mixed_precision": "bf16", "eval_every": 1000, "save_every": 2000, "log_every": 50,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    # A plain CNN on the 1,797 handwritten digits of scikit-learn, 8 x 8 pixels: a minute on two CPU cores.
    "demo": {
        "model": "convnet", "widths": "16,32", "validation_fraction": 0.2, "crop_padding": 1,
        "steps": 300, "global_batch_size": 64, "micro_batch_size": 64, "warmup_steps": 20, "learning_rate": 3e-3,
        "eval_every": 100, "save_every": 100, "log_every": 20,
    },
    "mnist": {
        "model": "convnet", "widths": "32,64,128", "dataset": "ylecun/mnist", "validation_split": "test",
        "crop_padding": 2, "steps": 2400, "global_batch_size": 128, "micro_batch_size": 128,
        "warmup_steps": 100, "learning_rate": 2e-3,
        "eval_every": 400, "save_every": 400, "log_every": 20,
    },
    "cifar10": {**_CIFAR, "dataset": "uoft-cs/cifar10"},
    "cifar100": {**_CIFAR, "dataset": "uoft-cs/cifar100", "label_column": "fine_label"},
}  # fmt: skip


@dataclass
class Config(VisionConfig, TrainConfig):
    """The fields of this recipe."""

    hidden_act: str = option("egem", "Activation: a name of the family or one that transformers knows, e.g. relu.")
    lr_schedule: Literal["cosine", "linear", "step"] = option(
        "cosine", "Decay of the learning rate after the warm-up; step: a tenth from half of all steps on, then 3/4."
    )
    min_lr_ratio: float = option(0.0, "Final learning rate, as a fraction of the peak.")
    weight_decay: float = option(0.05, "Weight decay of matrices and filters; nothing else is decayed.")
    label_smoothing: float = option(0.0, "Share of the target that is spread over all classes.")
    model: str = option(
        "convnet",
        "convnet, resnet<6n+2>-cifar, timm/<name>, or the id or folder of an image classifier of transformers, whose "
        "weights are not used.",
    )
    widths: str = option("32,64,128", "Channels of each stage of a convnet.")
    own_gain: bool = option(
        False, "Draw the filters of convnet and resnet-cifar with the gain of the activation, not sqrt(2) for all."
    )

    def validate(self) -> None:
        """Raises ValueError, naming the field, when a value makes no sense."""
        VisionConfig.validate(self)
        TrainConfig.validate(self)
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        require(
            not self.own_gain or _is_own(self.model),
            "own_gain",
            True,
            "false for models other than convnet and resnet-cifar",
        )
        widths = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.widths)
        require(bool(widths), "widths", self.widths, "numbers such as 32,64,128, all above 0")
        depth = re.fullmatch(_CIFAR_RESNET, self.model)
        sound = depth is None or (int(depth[1]) >= 8 and int(depth[1]) % 6 == 2)
        require(sound, "model", self.model, "resnet<6n+2>-cifar, such as resnet20-cifar or resnet56-cifar")


def input_size(config: Config) -> int | None:
    """The height and width that a model of transformers or timm is made for; those here take any."""
    if config.image_size or _is_own(config.model):
        return config.image_size
    if config.model.startswith("timm/"):
        known = timm.get_pretrained_cfg(config.model.removeprefix("timm/"))
        return known.input_size[-1] if known else None
    try:
        size = getattr(AutoConfig.from_pretrained(config.model), "image_size", None)
    except Exception as error:  # the Hub client raises its own
        raise ConfigError(f"--model {config.model!r} cannot be built: {type(error).__name__}: {error}") from error
    return size if isinstance(size, int) else None


def build_model(config: Config, data: ImageData) -> PreTrainedModel:
    """The model of `config` with new weights and its activation everywhere.

    Raises:
        ConfigError: there is no such model, it does not fit the images, or the activation does not get everywhere.
    """
    labels = dict(enumerate(data.classes))
    shared: Any = {"id2label": labels, "label2id": {name: number for number, name in labels.items()}}
    gain: Any = {"initializer_gain": hf_gem.gain(ACT2FN[config.hidden_act])} if config.own_gain else {}
    if config.model == "convnet":
        widths = tuple(map(int, config.widths.split(",")))
        most = data.image_size.bit_length()
        if len(widths) > most:
            raise ConfigError(
                f"--widths {config.widths} has {len(widths)} stages, each half as large as the one before, and images "
                f"of {data.image_size} x {data.image_size} pixels allow {most}; give fewer widths or larger images"
            )
        return ConvNetForImageClassification(
            ConvNetConfig(widths=widths, hidden_act=config.hidden_act, **gain, **shared)
        )
    if depth := re.fullmatch(_CIFAR_RESNET, config.model):
        return CifarResNetForImageClassification(
            CifarResNetConfig(depth=int(depth[1]), hidden_act=config.hidden_act, **gain, **shared)
        )
    ours = is_name(config.hidden_act)
    try:
        if config.model.startswith("timm/"):
            act: Any = {} if ours else {"model_args": {"act_layer": config.hidden_act}}
            settings: Any = TimmWrapperConfig(architecture=config.model.removeprefix("timm/"), **act, **shared)
        else:
            settings = AutoConfig.from_pretrained(config.model, **shared)
            if not ours:
                hf_gem.set_activation(settings, config.hidden_act)
        model = AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
    except Exception as error:  # both libraries raise whatever their models do
        raise ConfigError(f"--model {config.model!r} cannot be built: {type(error).__name__}: {error}") from error
    if not ours:
        _check_is_everywhere(model, config)
        return model
    try:
        print(hf_gem.convert(model, config.hidden_act))
    except ValueError as error:
        raise ConfigError(
            f"--hidden_act {config.hidden_act} cannot go into --model {config.model!r}: {error}; choose another --model"
        ) from error
    return model


def _check_is_everywhere(model: PreTrainedModel, config: Config) -> None:
    """A stock activation has to be wherever `hf_gem.convert` puts one of the family, or two runs differ in more."""
    wanted = kind(ACT2FN[config.hidden_act])
    found = ((slot, kind(slot.occupant) or "") for slot in stock_slots(model))
    others = [s for s, what in found if what != wanted and not is_gate(what) and is_elementwise(s.occupant)]
    if others:
        kinds = Counter(describe(slot.occupant) for slot in others)
        raise ConfigError(
            f"--hidden_act {config.hidden_act} does not reach {len(others)} activations of --model {config.model!r}, "
            f"{', '.join(f'{count} x {name}' for name, count in kinds.items())} at "
            f"{path_patterns([slot.path for slot in others])}, which a name of the family replaces: runs with the two "
            "would differ in more than the activation. Choose another --hidden_act, or a --model that takes it "
            "everywhere, such as resnet20-cifar or timm/resnet18"
        )


def _is_own(model: str) -> bool:
    return model == "convnet" or re.fullmatch(_CIFAR_RESNET, model) is not None


def card_values(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """What the model card says besides the record."""
    return {
        **image_card(config.model, record),
        "title": f"{config.model} {record['preset']}, {config.hidden_act}",
        # Older records do not say it.
        "imported": record.get("imported", f"hf_gem{'.training.image_models' if _is_own(config.model) else ''}"),
    }


def main(argv: list[str] | None = None) -> None:
    config, preset = parse_config(Config, PRESETS, "demo", argv)
    config.output_dir = config.output_dir or f"runs/vision-{preset}-{config.hidden_act}-seed{config.seed}"
    accelerator = make_accelerator(config)
    data = prepare_images(config, config.data_seed, accelerator.device, Preprocessing(image_size=input_size(config)))
    torch.manual_seed(config.seed)
    model = build_model(config, data)
    task = Task(
        name="vision_train",
        preset=preset,
        model=model,
        objective=ClassificationLoss(model, config.label_smoothing),
        train=data.train,
        validation=data.validation,
        data=data.facts,
        units_per_sample=1,
        unit="images",
        metric="accuracy",
        facts={"imported": import_of(model)},
    )
    record = train(task, config, accelerator)
    if not accelerator.is_main_process:
        return

    folder = Path(config.output_dir)
    save_results(folder, task.model, image_processor(data), record, TEMPLATE, **card_values(config, record))
    print_summary(record, folder)


if __name__ == "__main__":
    run_recipe(main)
