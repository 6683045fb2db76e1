"""Images of any size: threads decode, crop and scale them on demand, while the device computes."""

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

from ...files import shown
from ..errors import DataError
from .images import ImageData, ImageSplits, Rows, VisionConfig
from .normalisation import Normalisation, Preprocessing
from .order import uniforms
from .source import fingerprint

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class DecodedImages:
    """Images that threads decode, crop and scale for each batch.

    In training, the crop is random: it covers between `min_scale` and 1 of the area and has an aspect ratio between 3/4
    and 4/3, as for Inception (arXiv 1409.4842). With `min_scale` 1, it is the largest square in the middle. In
    evaluation, images are scaled and then cropped, as by an image processor of transformers.

    Attributes:
        rows: The images.
        size: Height and width of the result.
        normalisation: Normalisation of pixels.
        seed: Seed of the augmentation.
        num_workers: Number of threads.
        min_scale: Smallest share of the area that a crop covers in training.
        flip: Whether half of the images are flipped in training.
        crop_pct: Share of the shorter side that the center crop covers in evaluation.
        squash: Whether the center crop covers that share of both sides instead, and becomes square by scaling.
    """

    rows: Rows
    size: int
    normalisation: Normalisation
    seed: int = 0
    num_workers: int = 8
    min_scale: float = 1.0
    flip: bool = False
    crop_pct: float = 1.0
    squash: bool = False
    _pool: ThreadPoolExecutor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(self.num_workers, "decode")

    @property
    def labels(self) -> np.ndarray:
        """The label of each image, int64."""
        return self.rows.labels

    @property
    def edge(self) -> int:
        """The length to which evaluation scales the shorter side, or both sides, before it crops."""
        return round(self.size / self.crop_pct)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """Returns `pixel_values`, float32 of shape (len(indices), 3, size, size), and `labels`.

        In evaluation it also returns `units`, the numbers of the images.
        """
        random: Any = [None] * len(indices) if draws is None else uniforms((self.seed, 3), draws, (5,))
        arrays = list(self._pool.map(self._load, indices, random))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        batch = {"pixel_values": self.normalisation(pixels), "labels": torch.from_numpy(self.labels[indices])}
        return batch if draws is not None else {**batch, "units": torch.from_numpy(np.asarray(indices))}

    def _load(self, index: int, random: np.ndarray | None) -> np.ndarray:
        from PIL import Image

        image = self.rows.image(int(index)).convert("RGB")
        if random is None:
            return np.asarray(self._middle(image))
        box = self._box(image.width, image.height, random)
        # `reducing_gap` first shrinks by integer factors, which is faster for large images.
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
        array = np.asarray(image)
        return array[:, ::-1] if self.flip and random[4] < 0.5 else array

    def _middle(self, image: Any) -> Any:
        """Scales a PIL image and crops its middle, with the same rounding as `BitImageProcessor`."""
        sides, shorter = image.size, min(image.size)
        wide, high = (self.edge if self.squash else int(self.edge * side / shorter) for side in sides)
        left, top = (wide - self.size) // 2, (high - self.size) // 2
        return image.resize((wide, high), 3).crop((left, top, left + self.size, top + self.size))  # 3: bicubic

    def _box(self, width: int, height: int, random: np.ndarray) -> tuple[float, float, float, float]:
        """Returns left, top, right and bottom of the crop in training."""
        wide, high = (float(side if self.squash else min(width, height)) for side in (width, height))
        across = down = 0.5
        if self.min_scale < 1:
            area = width * height * (self.min_scale + (1 - self.min_scale) * random[0])
            ratio = np.exp(np.log(3 / 4) + random[1] * np.log(16 / 9))
            wide, high = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
            across, down = random[2:4]
        left, top = across * (width - wide), down * (height - high)
        return left, top, left + wide, top + high


def prepare_decoded(config: VisionConfig, splits: ImageSplits, seed: int, preprocessing: Preprocessing) -> ImageData:
    """Prepares images that are decoded for each batch; see `vision.prepare_images`.

    Raises:
        DataError: The config has an option that only works with resident images.
    """
    if config.crop_padding:
        raise DataError(
            f"got --crop_padding {config.crop_padding}, but the images of {shown(config.dataset)} are too large to be "
            "resident, or differ in size. It only works with resident images. Use --crop_min_scale, or --resident yes."
        )
    size = preprocessing.image_size or 224
    normalisation = preprocessing.normalisation or Normalisation(*_IMAGENET)
    crop: dict[str, Any] = {"size": size, "normalisation": normalisation, "seed": seed}
    crop |= {"num_workers": config.num_workers, "squash": preprocessing.squash}
    train = DecodedImages(splits.parts["train"], **crop, min_scale=config.crop_min_scale, flip=config.flip)
    crop["crop_pct"] = config.crop_pct or preprocessing.crop_pct
    validation = DecodedImages(splits.parts["validation"], **crop)
    test = DecodedImages(splits.parts["test"], **crop) if "test" in splits.parts else None
    # Hashing all pixels could take hours. Names and sizes of files, or the revision of a Hub dataset, replace them.
    files = [[Path(name).name, num_bytes] for name, num_bytes, _ in fingerprint(config.dataset) or []]
    source = [config.dataset_config, config.dataset_revision, config.image_column, files or config.dataset]
    digest = hashlib.sha256(json.dumps(source).encode() + splits.label_bytes())
    facts = splits.facts(digest.hexdigest(), "labels, and names and sizes of files", size)
    return ImageData(train, validation, test, splits.classes, size, normalisation, facts)
