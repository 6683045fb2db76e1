"""A network that maps coordinates to the value of a field, as a transformers model.

This file imports nothing from hf_gem, because `hf_gem.save_for_hub` copies it next to the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils.generic import ModelOutput


class CoordinateMLPConfig(PretrainedConfig):
    """Configuration of a multilayer perceptron that maps each point of a box to one value.

    Args:
        lower: Smallest coordinates of the box.
        upper: Largest coordinates of the box.
        hidden_size: Width of each hidden layer.
        num_hidden_layers: Number of hidden layers.
        hidden_act: Name of the activation.
        initializer_gain: Weights are normal with standard deviation gain / sqrt(inputs), or 1 / sqrt(inputs) in the
            first layer. Biases are zero. A gain of 1 is Glorot's initialisation for layers of equal widths.
    """

    model_type = "coordinate_mlp"

    def __init__(
        self,
        lower: Sequence[float] = (-1.0, -1.0),
        upper: Sequence[float] = (1.0, 1.0),
        hidden_size: int = 32,
        num_hidden_layers: int = 3,
        hidden_act: str = "tanh",
        initializer_gain: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if len(lower) != len(upper) or any(a >= b for a, b in zip(lower, upper, strict=True)):
            raise ValueError(
                f"got lower={list(lower)} and upper={list(upper)}. upper must be above lower in every coordinate. Give "
                "both the same length and swap what is reversed."
            )
        self.lower = list(lower)
        self.upper = list(upper)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.hidden_act = hidden_act
        self.initializer_gain = initializer_gain
        super().__init__(**kwargs)


@dataclass
class FieldOutput(ModelOutput):
    """The output of the model.

    Attributes:
        field: Values of the field at the points, of shape (batch,).
    """

    field: Tensor | None = None


class CoordinateMLPModel(PreTrainedModel):
    """The usual network of physics-informed learning: hidden layers of equal width, then a linear output layer.

    Each hidden layer is followed by the activation. Coordinates are shifted and scaled to have mean 0 and variance 1
    over the box.

    Args:
        config: A `CoordinateMLPConfig`.
    """

    config_class = CoordinateMLPConfig
    main_input_name = "points"
    center: Tensor
    scale: Tensor

    def __init__(self, config: CoordinateMLPConfig) -> None:
        super().__init__(config)
        lower, upper = torch.tensor(config.lower), torch.tensor(config.upper)
        self.register_buffer("center", (lower + upper) / 2)  # persistent: loading a checkpoint loses other buffers
        self.register_buffer("scale", math.sqrt(12) / (upper - lower))
        widths = [len(config.lower), *[config.hidden_size] * config.num_hidden_layers]
        layers: list[Any] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), ACT2FN[config.hidden_act]]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], 1)
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            gain = 1.0 if module is self.layers[0] else self.config.initializer_gain
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.in_features))
            nn.init.zeros_(module.bias)

    def forward(self, points: Tensor, **kwargs: Any) -> FieldOutput:
        """Computes the field at points of shape (batch, dimensions)."""
        return FieldOutput(field=self.head(self.layers((points - self.center) * self.scale)).squeeze(-1))


if __name__.startswith("hf_gem."):  # not the copy in a checkpoint
    AutoConfig.register(CoordinateMLPConfig.model_type, CoordinateMLPConfig)
    AutoModel.register(CoordinateMLPConfig, CoordinateMLPModel)
