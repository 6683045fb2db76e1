"""Small images of equal size, which are decoded once, kept on the device, and augmented there."""

from __future__ import annotations

import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ...files import shown
from ..device import to_device
from ..errors import DataError
from ..signals import check
from .images import ImageData, ImageSplits, Rows, VisionConfig
from .normalisation import Normalisation, Preprocessing
from .order import four_uniforms
from .source import STOPPED, cached, source_state
from .stored import ImageContent, read_array

_CACHE_FORMAT = 3  # increment when the content of the files changes
_RESIDENT_BYTES = 1 << 31  # the most that decoded training images may take


@dataclass
class ResidentImages:
    """Decoded images on a device.

    Attributes:
        images: The images, uint8 of shape (images, channels, height, width), with one or three channels.
        labels: The labels, int64, on the CPU.
        normalisation: Normalisation of pixels.
        seed: Seed of the augmentation.
        padding: Pixels of padding around an image before it is cropped at random. They are zero after normalisation,
            which is the mean colour.
        flip: Whether half of the images are flipped.
    """

    images: Tensor
    labels: Tensor
    normalisation: Normalisation
    seed: int = 0
    padding: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray, draws: np.ndarray | None = None) -> dict[str, Tensor]:
        """Returns `pixel_values`, float32 of shape (len(indices), 3, height, width) on the device, and `labels`.

        In evaluation it also returns `units`, the numbers of the images.
        """
        device = self.images.device
        pixels = self.normalisation(self.images[to_device(torch.from_numpy(np.asarray(indices)), device)])
        if draws is not None and (self.padding or self.flip):
            pixels = self._augment(pixels, four_uniforms((self.seed, 2), draws))
        batch = {"pixel_values": pixels, "labels": self.labels[torch.from_numpy(np.asarray(indices))]}
        return batch if draws is not None else {**batch, "units": torch.from_numpy(np.asarray(indices))}

    def _augment(self, pixels: Tensor, random: np.ndarray) -> Tensor:
        height, width = pixels.shape[-2:]
        top, left = (random[:, :2] * (2 * self.padding + 1)).astype(np.int64).T
        rows = top[:, None] + np.arange(height)
        columns = left[:, None] + np.arange(width)
        if self.flip:
            columns = np.where(random[:, 2:3] < 0.5, columns[:, ::-1], columns)
        padded = F.pad(pixels, [self.padding] * 4)
        rows, columns = (to_device(torch.from_numpy(part.copy()), pixels.device) for part in (rows, columns))
        each = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        crops = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        # Channels are last in memory, which is good for a GPU. On a CPU it makes the backward pass of a 1 x 1
        # convolution with stride 2 and few channels corrupt the heap (torch 2.14).
        return crops.contiguous() if crops.device.type == "cpu" else crops


def can_be_resident(rows: Rows, size: int | None) -> bool:
    """Returns whether images can stay on the device, judged by a few. Decoding checks that all sizes are equal."""
    sizes = {rows.image(int(i)).size for i in np.linspace(0, len(rows) - 1, 16)}
    (width, height), *others = sizes
    alike = not others and width == height and size in (None, width)
    return alike and 3 * width * height * len(rows) <= _RESIDENT_BYTES


def prepare_resident(
    config: VisionConfig, splits: ImageSplits, seed: int, device: torch.device, preprocessing: Preprocessing
) -> ImageData:
    """Prepares images that are decoded once, or read from the cache; see `vision.prepare_images`.

    Raises:
        DataError: An image cannot be read, the images cannot be resident, the config has an option that only works with
            other images, or the cache cannot be written.
        Interrupted: A signal arrived.
    """
    for name, unused in (("crop_min_scale", (1,)), ("crop_pct", (1, None))):
        if (value := getattr(config, name)) not in unused:
            raise DataError(
                f"got --{name} {value}, but the images of {shown(config.dataset)} are resident. It only works with "
                "images that are decoded for each batch. Set it to 1, or use --resident no."
            )
    labels_hash = hashlib.sha256(splits.label_bytes()).hexdigest()  # it changes if the Hub changes the order of images
    wanted = preprocessing.image_size
    key = [_CACHE_FORMAT, source_state(config), config.image_column, config.label_column, labels_hash, wanted]
    build = functools.partial(_decode_all, config, splits, wanted)
    folder, meta = cached(config, "images", key, ImageContent, build)
    images = {split: read_array(folder / f"{split}.npy", np.uint8, 4) for split in splits.parts}
    height, size = images["train"].shape[-2:]
    for split, rows in splits.parts.items():
        if images[split].shape[1:] not in ((1, height, size), (3, height, size)) or len(images[split]) != len(rows):
            raise DataError(
                f"{folder / split}.npy does not hold the images of {shown(config.dataset)}. Delete the folder."
            )
    if height != size:
        raise DataError(
            f"the images of {shown(config.dataset)} are {height} x {size}. Resident images must be square. Give an "
            "--image_size, or use --resident no."
        )
    normalisation = preprocessing.normalisation or Normalisation(meta["mean"], meta["std"])

    augmentation: dict[str, Any] = {"padding": config.crop_padding, "flip": config.flip}
    resident = {
        split: ResidentImages(
            torch.from_numpy(images[split]).to(device),
            torch.from_numpy(rows.labels),
            normalisation,
            seed,
            **(augmentation if split == "train" else {}),
        )
        for split, rows in splits.parts.items()
    }
    facts = splits.facts(meta["hash"], "images and labels", size)
    evaluated = resident["validation"], resident.get("test")
    return ImageData(resident["train"], *evaluated, splits.classes, size, normalisation, facts)


def _decode_all(config: VisionConfig, splits: ImageSplits, size: int | None, folder: Path) -> dict[str, Any]:
    """Writes the pixels of each part. Returns their hash, and mean and deviation of the training images."""
    digest = hashlib.sha256()
    moments: tuple[list[float], list[float]] = ([], [])
    sizes: dict[tuple[int, ...], str] = {}
    for split, rows in splits.parts.items():
        images = _decode(config, rows, size, split)
        sizes.setdefault(images.shape[2:], split)
        if len(sizes) > 1:
            found = " and ".join(f"{height} x {width} ({part})" for (height, width), part in sizes.items())
            raise DataError(
                f"the images of {shown(config.dataset)} are {found}. Resident images must all have the same shape. "
                "Give an --image_size, or use --resident no."
            )
        np.save(folder / f"{split}.npy", images)
        digest.update(images.tobytes() + rows.labels.tobytes())
        if split == "train":
            moments = _moments(images)
    return {"hash": digest.hexdigest(), "mean": moments[0], "std": moments[1]}


def _decode(config: VisionConfig, rows: Rows, size: int | None, split: str) -> np.ndarray:
    """Decodes images to uint8 (images, channels, height, width), scaled to squares if a size is given."""
    from PIL import Image

    def decode(index: int) -> np.ndarray:
        check(STOPPED)  # here, because otherwise the pool would decode all queued images before it ends
        image = rows.image(index)
        if size is not None and image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)  # smooths before it shrinks
        return np.asarray(image)

    with ThreadPoolExecutor(config.num_workers) as pool:
        decoded = pool.map(decode, range(len(rows)))
        arrays = list(tqdm(decoded, total=len(rows), desc=f"Decoding {split}", unit=" images", unit_scale=True))
    if any(array.ndim == 3 for array in arrays):  # some are grey, some are not
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, -1) for array in arrays]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise DataError(
            f"the images of {shown(config.dataset)} have {len(shapes)} shapes, including {sorted(shapes)[0]} and "
            f"{sorted(shapes)[-1]}. Resident images must all have the same shape. Give an --image_size, or use "
            "--resident no."
        )
    images = np.stack([array.reshape(*array.shape[:2], -1) for array in arrays]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(images)


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Computes mean and standard deviation per channel, for pixels in [0, 1], repeating a grey channel three times.

    The deviation of a constant channel counts as 1, so that normalisation makes it 0.
    """
    counts = np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in images.swapaxes(0, 1)])
    share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
    mean = share @ value
    variance = (share * (value - mean[:, None]) ** 2).sum(1)
    std = np.sqrt(np.where(variance == 0, 1, variance))
    return np.resize(mean, 3).tolist(), np.resize(std, 3).tolist()
