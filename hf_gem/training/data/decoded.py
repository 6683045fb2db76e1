"""Images of any size: decoded, cropped and scaled when they are needed, by threads, while the device computes."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .images import ImageData, ImageSplits, Rows, VisionConfig
from .normalisation import Normalisation, Preprocessing
from .order import uniforms
from .source import fingerprint

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class DecodedImages:
    """Images that are decoded, cropped and scaled for each batch, by threads.

    In training, the crop has a random share of the area, between `min_scale` and 1, and an aspect ratio between 3/4 and
    4/3, as for Inception (arXiv 1409.4842); with a `min_scale` of 1, as in evaluation, it is the middle one.

    Attributes:
        rows: The images.
        size: Height and width of the result.
        normalisation: Of pixels.
        seed: Of the augmentation.
        num_workers: Threads.
        min_scale: Smallest share of the area in training.
        flip: Whether half of the images are flipped in training.
        crop_pct: Share of the shorter side that the middle crop has.
    """

    rows: Rows
    size: int
    normalisation: Normalisation
    seed: int = 0
    num_workers: int = 8
    min_scale: float = 1.0
    flip: bool = False
    crop_pct: float = 1.0
    _pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.num_workers, "decode")

    @property
    def labels(self) -> np.ndarray:
        """int64, one for each image."""
        return self.rows.labels

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """`pixel_values`, float32 of shape (len(indices), 3, size, size), and `labels`.

        In evaluation, `units` too, the numbers of the images.
        """
        random: Any = [None] * len(indices) if draws is None else uniforms((self.seed, 3), draws, (5,))
        arrays = list(self._pool.map(self._load, indices, random))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        batch = {"pixel_values": self.normalisation(pixels), "labels": torch.from_numpy(self.labels[indices])}
        return batch if draws is not None else {**batch, "units": torch.from_numpy(np.asarray(indices))}

    def _load(self, index: int, random: np.ndarray | None) -> np.ndarray:
        from PIL import Image

        image = self.rows.image(int(index)).convert("RGB")
        box = self._box(image.width, image.height, random)
        # `reducing_gap` first shrinks by whole factors, which costs a large image less
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        array = np.asarray(image)
        return array[:, ::-1] if random is not None and self.flip and random[4] < 0.5 else array

    def _box(self, width: int, height: int, random: np.ndarray | None) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the crop."""
        wide = high = min(width, height) * (self.crop_pct if random is None else 1.0)
        across = down = 0.5
        if random is not None and self.min_scale < 1:
            area = width * height * (self.min_scale + (1 - self.min_scale) * random[0])
            ratio = np.exp(np.log(3 / 4) + random[1] * np.log(16 / 9))
            wide, high = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
            across, down = random[2:4]
        left, top = across * (width - wide), down * (height - high)
        return left, top, left + wide, top + high


def prepare_decoded(config: VisionConfig, splits: ImageSplits, seed: int, preprocessing: Preprocessing) -> ImageData:
    """Image data that are decoded for each batch; see `vision.prepare_images`.

    Raises:
        DataError: the config asks for what resident images alone have.
    """
    if config.crop_padding:
        raise DataError(
            f"--crop_padding {config.crop_padding} is for resident images, and those of {config.dataset!r} are too "
            "large, or not all of one size; use --crop_min_scale, or --resident yes"
        )
    size = preprocessing.image_size or 224
    normalisation = preprocessing.normalisation or Normalisation(*_IMAGENET)
    crop: dict[str, Any] = {"size": size, "normalisation": normalisation, "seed": seed}
    crop["num_workers"] = config.num_workers
    train = DecodedImages(splits.parts["train"], **crop, min_scale=config.crop_min_scale, flip=config.flip)
    crop["crop_pct"] = config.crop_pct or preprocessing.crop_pct
    validation = DecodedImages(splits.parts["validation"], **crop)
    test = DecodedImages(splits.parts["test"], **crop) if "test" in splits.parts else None
    # All pixels would take hours to read. Of files, names and sizes stand for them; of a Hub dataset, its revision.
    files = [[Path(name).name, num_bytes] for name, num_bytes, _ in fingerprint(config.dataset) or []]
    source = [config.dataset_config, config.dataset_revision, config.image_column, files or config.dataset]
    digest = hashlib.sha256(json.dumps(source).encode() + splits.label_bytes())
    facts = splits.facts(digest.hexdigest(), "labels, and names and sizes of files", size)
    return ImageData(train, validation, test, splits.classes, size, normalisation, facts)
