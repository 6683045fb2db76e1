"""Trains image classifiers from scratch with any activation: accelerate launch recipes/vision_train.py --preset demo"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from hf_gem.files import shown
from hf_gem.init import gain
from hf_gem.training.classifiers import class_names, depth_and_width, input_size, is_own, new_classifier
from hf_gem.training.config import TrainConfig, not_given, option, parse_config, require
from hf_gem.training.data.images import ImageData, VisionConfig
from hf_gem.training.data.normalisation import Preprocessing
from hf_gem.training.data.vision import image_processor, prepare_images
from hf_gem.training.errors import ConfigError
from hf_gem.training.image_models import (
    CifarResNetConfig,
    CifarResNetForImageClassification,
    ConvNetConfig,
    ConvNetForImageClassification,
)
from hf_gem.training.initial import new_task
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import ClassificationLoss
from hf_gem.training.report import image_card, import_of, print_summary, save_results
from hf_gem.training.signals import run_recipe
from hf_gem.training.task import Task

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
    # 8 epochs of a wide and shallow network, with linear decay of the learning rate: seconds on a large GPU.
    "cifar10-fast": {
        **_CIFAR, "dataset": "uoft-cs/cifar10", "model": "resnet8x64-cifar", "label_smoothing": 0.1,
        "learning_rate": 0.4, "weight_decay": 5e-4, "lr_schedule": "linear", "steps": 782, "warmup_steps": 150,
        "global_batch_size": 512, "micro_batch_size": 512, "eval_every": 0, "save_every": 0, "log_every": 100,
    },
    "cifar100": {**_CIFAR, "dataset": "uoft-cs/cifar100", "label_column": "fine_label"},
}  # fmt: skip


@dataclass
class Config(VisionConfig, TrainConfig):
    """The config of this recipe."""

    hidden_act: str = option("egem", "Activation: a name of the family, or one of transformers, such as relu.")
    lr_schedule: Literal["cosine", "linear", "step"] = option(
        "cosine", "Decay of the learning rate after the warm-up; step divides it by 10 at 1/2 and at 3/4 of all steps."
    )
    min_lr_ratio: float = option(0.0, "Final learning rate as a fraction of the peak.")
    weight_decay: float = option(0.05, "Weight decay of matrices and filters; nothing else is decayed.")
    label_smoothing: float = option(0.0, "Share of the target that is spread over all classes.")
    model: str = option(
        "convnet",
        "convnet, resnet<6n+2>-cifar, resnet<6n+2>x<width>-cifar, timm/<name>, or the id or folder of an image "
        "classifier of transformers, whose weights are not used.",
    )
    widths: str = option("32,64,128", "Channels of each stage of a convnet.")
    own_gain: bool = option(
        False, "Draw the filters of convnet and resnet-cifar with the activation's own gain instead of sqrt(2)."
    )
    act_after_add: Literal["same", "none"] = option(
        "same", "Activation after the addition in each block of a resnet-cifar: the same one, or none."
    )

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        VisionConfig.validate(self)
        TrainConfig.validate(self)
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        fits = not self.own_gain or is_own(self.model)
        require(fits, "own_gain", True, "false for models other than convnet and resnet-cifar")
        if self.model != "convnet":
            not_given(self, "for models other than convnet", "widths")
        widths = re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", self.widths)
        require(bool(widths), "widths", self.widths, "numbers such as 32,64,128, all above 0")
        found = depth_and_width(self.model)
        require(
            found is None or (found[0] >= 8 and found[0] % 6 == 2),
            "model",
            self.model,
            "resnet<6n+2>-cifar, such as resnet56-cifar, or with a width, resnet8x64-cifar",
        )
        fits = self.act_after_add == "same" or found is not None
        require(fits, "act_after_add", self.act_after_add, "same for models other than resnet-cifar")


def build_model(config: Config, data: ImageData) -> PreTrainedModel:
    """Builds the model of `config` with new weights and the same activation everywhere.

    Raises:
        ConfigError: There is no such model, it does not fit the images, or the activation does not reach every place.
    """
    shared = class_names(data.classes)
    own: Any = {"initializer_gain": gain(ACT2FN[config.hidden_act])} if config.own_gain else {}
    if config.model == "convnet":
        widths = tuple(map(int, config.widths.split(",")))
        most = data.image_size.bit_length()
        if len(widths) > most:
            raise ConfigError(
                f"--widths {shown(config.widths)} has {len(widths)} stages, and each halves the image. Images of "
                f"{data.image_size} x {data.image_size} pixels allow {most}. Give fewer widths, or larger images."
            )
        return ConvNetForImageClassification(
            ConvNetConfig(widths=widths, hidden_act=config.hidden_act, **own, **shared)
        )
    if found := depth_and_width(config.model):
        own |= {"hidden_act": config.hidden_act, "act_after_add": config.act_after_add}
        return CifarResNetForImageClassification(CifarResNetConfig(depth=found[0], width=found[1], **own, **shared))
    return new_classifier(config.model, config.hidden_act, data.classes)


def card_values(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of the model card that are not in the record."""
    return {
        **image_card(config.model, record),
        "title": f"{config.model} {record['preset']}, {config.hidden_act}",
        # Older records lack this field.
        "imported": record.get("imported", f"hf_gem{'.training.image_models' if is_own(config.model) else ''}"),
    }


def main(argv: list[str] | None = None) -> None:
    config, preset = parse_config(Config, PRESETS, "demo", argv)
    config.output_dir = config.output_dir or f"runs/vision-{preset}-{config.act_label}-seed{config.seed}"
    accelerator = make_accelerator(config)
    size = config.image_size or (None if is_own(config.model) else input_size(config.model))
    data = prepare_images(config, config.data_seed, accelerator.device, Preprocessing(image_size=size))

    def make() -> Task:
        model = build_model(config, data)
        return Task(
            name="vision_train",
            preset=preset,
            model=model,
            objective=ClassificationLoss(model, config.label_smoothing),
            train=data.train,
            validation=data.validation,
            test=data.test,
            data=data.facts,
            units_per_sample=1,
            unit="images",
            metrics=("accuracy",),
            facts={"imported": import_of(model)},
        )

    task = new_task(make, config)
    record = train(task, config, accelerator)
    if accelerator.is_main_process:
        save_results(task.model, image_processor(data), record, **card_values(config, record))
        print_summary(record)


if __name__ == "__main__":
    run_recipe(main)
