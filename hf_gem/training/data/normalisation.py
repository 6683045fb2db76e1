"""From pixels to what a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Normalisation:
    """What a model takes: `(pixels / 255 - mean) / std`, for three channels each.

    Attributes:
        mean: By channel, of pixels in [0, 1].
        std: Likewise.
    """

    mean: Sequence[float]
    std: Sequence[float]
    _tensors: dict[torch.device, list[Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 of shape (batch, 3, height, width) from uint8, (batch, channels, height, width); grey is repeated."""
        if pixels.device not in self._tensors:  # once, since a copy to a GPU waits for it
            self._tensors[pixels.device] = [
                torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (self.mean, self.std)
            ]
        mean, std = self._tensors[pixels.device]
        return pixels.float().div(255).sub(mean).div(std)


@dataclass(frozen=True)
class Preprocessing:
    """What a model says of the images it takes.

    Attributes:
        normalisation: Of pixels; None where it does not say.
        image_size: Height and width; likewise.
        crop_pct: Share of the shorter side of a larger image.
    """

    normalisation: Normalisation | None = None
    image_size: int | None = None
    crop_pct: float = 1.0
