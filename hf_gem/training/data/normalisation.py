"""Converts pixels to the inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """Normalises pixels to `(pixels / 255 - mean) / std`, with three channels.

    Attributes:
        mean: Mean of each channel, for pixels in [0, 1].
        std: Standard deviation of each channel, for pixels in [0, 1].
    """

    mean: Sequence[float]
    std: Sequence[float]
    _tensors: dict[torch.device, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Maps uint8 (batch, channels, height, width) to float32 (batch, 3, height, width). Grey is repeated."""
        if pixels.device not in self._tensors:  # only once, since a copy to a GPU waits for the device
            self._tensors[pixels.device] = [
                torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std)
            ]
        mean, std = self._tensors[pixels.device]
        return pixels.float().div(255).sub(mean).div(std)


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a model expects.

    Attributes:
        normalisation: Normalisation of pixels, or None if the model does not say.
        image_size: Height and width of images, or None if the model does not say.
        crop_pct: Share of the shorter side that the center crop of a larger image covers.
        squash: Whether the crop covers that share of both sides, so that images of any shape become square.
    """

    normalisation: Normalisation | None = None
    image_size: int | None = None
    crop_pct: float = 1.0
    squash: bool = False
