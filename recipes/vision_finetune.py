"""Fine-tunes a pretrained image classifier with its activations replaced: accelerate launch recipes/vision_finetune.py

It reports the accuracy before the activations are replaced, right after that, and after fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from timm.data import Mixup
from transformers import PreTrainedModel

from hf_gem.family.names import is_claimed
from hf_gem.modules import GemActivation
from hf_gem.surgery.slots import named_modules
from hf_gem.training.classifiers import last_layer, load_classifier, replace_activations
from hf_gem.training.config import TrainConfig, at_least, not_given, option, parse_config, require
from hf_gem.training.data.images import ImageData, VisionConfig
from hf_gem.training.data.order import SampleOrder
from hf_gem.training.data.vision import image_processor, prepare_images, preprocessing_of
from hf_gem.training.evaluate import evaluate
from hf_gem.training.initial import NUM_SINGLE, activation_inputs
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import ClassificationLoss
from hf_gem.training.memory import fixed_micro_batch_size
from hf_gem.training.report import image_card, import_of, print_summary, save_results
from hf_gem.training.signals import check, run_recipe
from hf_gem.training.task import Task

PRESETS: dict[str, dict[str, Any]] = {
    # A checkpoint of `vision_train.py --preset demo --hidden_act gelu`, on the same digits.
    "demo": {
        "model": "runs/vision-demo-gelu-seed0", "hidden_act": "egem", "eps": "fit", "validation_fraction": 0.2,
        "steps": 100, "global_batch_size": 64, "micro_batch_size": 64, "warmup_steps": 20, "learning_rate": 1e-3,
        "eval_every": 50, "save_every": 50, "log_every": 10,
    },
    # Ten epochs of ImageNet-1k from timm's weights, with weaker augmentation than in their training.
    "resnet50-imagenet": {
        "model": "timm/resnet50.a1_in1k", "dataset": "ILSVRC/imagenet-1k", "hidden_act": "egem", "eps": "fit",
        "crop_min_scale": 0.35, "flip": True, "mixup": 0.1, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9998,
        "steps": 12_500, "global_batch_size": 1024, "micro_batch_size": 256, "warmup_steps": 600, "learning_rate": 1e-3,
        "weight_decay": 0.02, "mixed_precision": "bf16", "eval_every": 1250, "save_every": 1250, "num_workers": 16,
    },
    # CIFAR-100 at 224 pixels, with a new head.
    "vit-cifar100": {
        "model": "google/vit-base-patch16-224-in21k", "dataset": "uoft-cs/cifar100", "label_column": "fine_label",
        "validation_split": "test", "hidden_act": "segem", "eps": "fit", "crop_min_scale": 0.5, "flip": True,
        "steps": 8000, "global_batch_size": 256, "micro_batch_size": 64, "warmup_steps": 500, "learning_rate": 5e-5,
        "head_lr_ratio": 10, "mixed_precision": "bf16", "eval_every": 500, "save_every": 1000, "num_workers": 16,
    },
}  # fmt: skip


@dataclass
class Config(VisionConfig, TrainConfig):
    """The config of this recipe."""

    eps_choices: ClassVar[tuple[str, ...]] = ("fit", "match")

    hidden_act: str = option("egem", "The new activation: a name of the family, or none to keep the old ones.")
    min_lr_ratio: float = option(0.0, "Final learning rate as a fraction of the peak.")
    weight_decay: float = option(0.05, "Weight decay of matrices and filters; nothing else is decayed.")
    model: str = option(
        "", "timm/<name>, a Hub id, or the folder of an image classifier of transformers, timm or vision_train.py."
    )
    eps: str | None = option(
        None, "A number that replaces the eps in --hidden_act, or fit or match to choose it as hf_gem.convert does."
    )
    fit_per_layer: bool = option(False, "With --eps fit or match: choose a separate eps for each activation.")
    fit_batches: int = option(4, f"With --eps fit or match: number of batches of {NUM_SINGLE} training images to use.")
    new_head: bool = option(False, "Start with a new last layer even if the model has the right number of classes.")
    head_lr_ratio: float = option(1.0, "Learning rate of the last layer as a multiple of the others'.")
    mixup: float = option(0.0, "Alpha of mixup (arXiv 1710.09412); 0: off. Images mix within a micro-batch.")
    cutmix: float = option(0.0, "Alpha of CutMix (arXiv 1905.04899); 0: off.")
    label_smoothing: float = option(0.0, "Share of the target that is spread over all classes.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        VisionConfig.validate(self)
        if self.hidden_act == "none":
            others = replace(self, hidden_act="relu", eps=None)
            others.given = self.given
            TrainConfig.validate(others)
        else:
            allowed = "a name of the family, such as egem, or none"
            require(is_claimed(self.hidden_act), "hidden_act", self.hidden_act, allowed)
            TrainConfig.validate(self)
        require(bool(self.model), "model", self.model, "timm/<name>, a Hub id or a folder")
        chooses = self.eps in self.eps_choices
        has_eps = self.hidden_act != "none" or chooses or self.eps is None  # presets choose
        require(has_eps, "eps", self.eps, "left out: --hidden_act none keeps the old activations")
        chooses &= self.hidden_act != "none"
        allowed = "false without --eps fit or match, and with --hidden_act none"
        require(chooses or not self.fit_per_layer, "fit_per_layer", True, allowed)
        if not chooses:
            not_given(self, "without --eps fit or match, and with --hidden_act none", "fit_batches")
        at_least(self, 1, "fit_batches")
        at_least(self, 0, "head_lr_ratio", "mixup", "cutmix")
        require(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        fits = not (self.mixup or self.cutmix) or fixed_micro_batch_size(self) % 2 == 0
        require(fits, "micro_batch_size", self.micro_batch_size, "even with --mixup or --cutmix")


def convert(model: PreTrainedModel, config: Config, data: ImageData, device: torch.device) -> str:
    """Replaces the activations in place and returns the report.

    Raises:
        ConfigError: The model has no activation that can be replaced, or none can be fitted.
    """
    order = SampleOrder(len(data.train), config.data_seed)
    batches = []
    chosen = config.eps if config.eps in config.eps_choices else None  # a number is in the name
    for k in range(config.fit_batches if chosen else 0):
        check()
        indices = order.batch(k, NUM_SINGLE)  # not the micro-batch, which may change when a run is resumed
        batches.append({"pixel_values": data.train.batch(indices)["pixel_values"].to(device)})
    fix = "Choose another --model, or keep its activations with --hidden_act none."
    how: Any = {"eps": chosen, "data": batches or None, "per_layer": config.fit_per_layer, "c": config.match_c}
    return replace_activations(model, config.model, config.hidden_act, fix, **how)


def card_values(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of the model card that are not in the record."""
    return {
        **image_card(config.model, record),
        "title": ", ".join([config.model, *([config.hidden_act] if record["conversion"] else []), record["preset"]]),
        "imported": record["imported"],
        "ours": record["ours"],
    }


def main(argv: list[str] | None = None) -> None:
    config, preset = parse_config(Config, PRESETS, "demo", argv)
    config.output_dir = config.output_dir or f"runs/finetune-{preset}-{config.hidden_act}-seed{config.seed}"
    accelerator = make_accelerator(config)
    torch.manual_seed(config.seed)  # for a new last layer
    data = prepare_images(config, config.data_seed, accelerator.device, preprocessing_of(config.model))
    model = load_classifier(config.model, data.classes, config.new_head).to(accelerator.device)
    targets: Any = {"label_smoothing": config.label_smoothing, "num_classes": len(data.classes)}
    mixup = Mixup(config.mixup, config.cutmix, **targets) if config.mixup or config.cutmix else None
    task = Task(
        name="vision_finetune",
        preset=preset,
        model=model,
        objective=ClassificationLoss(model, config.label_smoothing, mixup),
        train=data.train,
        validation=data.validation,
        test=data.test,
        data=data.facts,
        units_per_sample=1,
        unit="images",
        metrics=("accuracy",),
        lr_ratios={last_layer(model): config.head_lr_ratio},
    )
    with accelerator.autocast():  # as in later evaluations
        size = fixed_micro_batch_size(config)
        before = evaluate(task.objective, task.validation, task.metrics, size, accelerator).values
    accelerator.print("before: " + ", ".join(f"{name} {value:.4f}" for name, value in before.items()))
    report = convert(model, config, data, accelerator.device) if config.hidden_act != "none" else ""
    accelerator.print(report)
    # Each process fits by itself. So does a resumed run, because checkpoints do not contain eps.
    activations = [module.spec.name for _, module in named_modules(model) if isinstance(module, GemActivation)]
    task.identity = {"activations": activations}
    task.facts = {"before_conversion": before, "conversion": report, "ours": bool(activations)}
    task.facts |= {"imported": import_of(model), "activation_inputs": activation_inputs(task, config)}
    record = train(task, config, accelerator)
    if accelerator.is_main_process:
        save_results(task.model, image_processor(data), record, **card_values(config, record))
        after = record["curves"]["validation_accuracy"]
        converted = f"with {config.hidden_act} {after[0][1]:.2%}, " if report else ""
        print(f"Accuracy before {before['accuracy']:.2%}, {converted}fine-tuned {after[-1][1]:.2%}")
        print_summary(record)


if __name__ == "__main__":
    run_recipe(main)
