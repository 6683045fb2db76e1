"""Small image classifiers as transformers models: the CIFAR ResNets of He et al., and a plain CNN.

This file imports nothing from hf_gem, because `hf_gem.save_for_hub` copies it next to the weights.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention


class CifarResNetConfig(PretrainedConfig):
    """Configuration of a residual network with 6n + 2 layers.

    Args:
        depth: Number of layers: 20, 32, 44, 56, 110 ...
        width: Channels of the first stage. The other stages have two and four times as many.
        hidden_act: Name of the activation.
        initializer_gain: Filters are normal with standard deviation gain / sqrt(outputs x height x width). The default
            sqrt(2) follows reference 13 of the paper.
        num_channels: Channels of the images.
        act_after_add: The activation after the addition in each block: `same` for the same one, or `none`.
    """

    model_type = "cifar_resnet"

    def __init__(
        self,
        depth: int = 56,
        width: int = 16,
        hidden_act: str = "relu",
        initializer_gain: float = math.sqrt(2),
        num_channels: int = 3,
        act_after_add: str = "same",
        **kwargs: Any,
    ) -> None:
        if act_after_add not in ("same", "none"):
            raise ValueError(f"act_after_add must be 'same' or 'none', got {act_after_add!r:.80}")
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2, such as 20, 56 or 110, got {depth}")
        self.depth = depth
        self.width = width
        self.hidden_act = hidden_act
        self.initializer_gain = initializer_gain
        self.num_channels = num_channels
        self.act_after_add = act_after_add
        super().__init__(**kwargs)


class ConvNetConfig(PretrainedConfig):
    """Configuration of a plain CNN.

    Each stage has two 3 x 3 convolutions. Max pooling between stages halves the image. Global average pooling and a
    linear layer follow.

    Args:
        widths: Channels of each stage.
        hidden_act: Name of the activation.
        initializer_gain: Filters are normal with standard deviation gain / sqrt(inputs x height x width).
        num_channels: Channels of the images.
    """

    model_type = "gem_convnet"

    def __init__(
        self,
        widths: tuple[int, ...] = (32, 64, 128),
        hidden_act: str = "relu",
        initializer_gain: float = math.sqrt(2),
        num_channels: int = 3,
        **kwargs: Any,
    ) -> None:
        self.widths = list(widths)
        self.hidden_act = hidden_act
        self.initializer_gain = initializer_gain
        self.num_channels = num_channels
        super().__init__(**kwargs)


class _ImageClassifier(PreTrainedModel):
    main_input_name = "pixel_values"
    fan = "fan_in"
    classifier: nn.Linear

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            fan = module.weight[0 if self.fan == "fan_in" else slice(None), 0 if self.fan == "fan_out" else slice(None)]
            nn.init.normal_(module.weight, std=self.config.initializer_gain / math.sqrt(fan.numel()))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.reset_running_stats()

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Computes class scores of images (batch, channels, height, width), and the mean loss if `labels` are given."""
        logits = self.classifier(self.features(pixel_values).mean((-2, -1)))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else None
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)


class _BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters.

    Where the number of channels changes, the shortcut takes every other pixel and fills new channels with zeros (option
    A of the paper).
    """

    def __init__(self, inputs: int, outputs: int, act: str, act_after_add: str) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.new = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.act1 = ACT2FN[act]
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = ACT2FN[act] if act_after_add == "same" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))
        result: Tensor = self.act2(x + residual)
        return result


class CifarResNetForImageClassification(_ImageClassifier):
    """Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2; 0.85M parameters at depth 56.

    Args:
        config: A `CifarResNetConfig`.
    """

    config_class = CifarResNetConfig
    fan = "fan_out"
    _no_split_modules = ["_BasicBlock"]  # noqa: RUF012  # as transformers has it

    def __init__(self, config: CifarResNetConfig) -> None:
        super().__init__(config)
        width, per_stage = config.width, (config.depth - 2) // 6
        self.conv = nn.Conv2d(config.num_channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = ACT2FN[config.hidden_act]
        channels = [width, *(width * 2**stage for stage in range(3) for _ in range(per_stage))]
        pairs = itertools.pairwise(channels)
        acts = config.hidden_act, config.act_after_add
        self.blocks = nn.Sequential(*[_BasicBlock(before, after, *acts) for before, after in pairs])
        self.classifier = nn.Linear(channels[-1], config.num_labels or 2)
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    def features(self, x: Tensor) -> Tensor:
        """Computes the feature maps of the last stage, (batch, 4 width, height / 4, width / 4)."""
        features: Tensor = self.blocks(self.act(self.bn(self.conv(x))))
        return features


class ConvNetForImageClassification(_ImageClassifier):
    """A plain CNN without normalisation, so the loss does not depend on how a batch is split.

    Args:
        config: A `ConvNetConfig`.
    """

    config_class = ConvNetConfig

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__(config)
        layers: list[Any] = []
        before = config.num_channels
        for stage, width in enumerate(config.widths):
            layers += [nn.MaxPool2d(2)] if stage else []
            for inputs in (before, width):
                layers += [nn.Conv2d(inputs, width, 3, 1, 1), ACT2FN[config.hidden_act]]
            before = width
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(before, config.num_labels or 2)
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    def features(self, x: Tensor) -> Tensor:
        """Computes the feature maps of the last stage."""
        features: Tensor = self.layers(x)
        return features


if __name__.startswith("hf_gem."):  # not the copy in a checkpoint
    for _model in (CifarResNetForImageClassification, ConvNetForImageClassification):
        AutoConfig.register(_model.config_class.model_type, _model.config_class)
        AutoModelForImageClassification.register(_model.config_class, _model)
