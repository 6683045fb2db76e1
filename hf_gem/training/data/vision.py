"""Images: from a dataset, a folder or scikit-learn's digits to batches that are augmented and normalised.

Small images of one size are decoded once, kept on the device, and augmented there. Others are decoded by threads, while
the device computes, and their random crops are cut before they are scaled. What is random about a sample is a function
of the seed and the number of its draw, so it is the same on any number of processes and after a restart.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..config import at_least, option, require
from ..errors import DataError
from ..loop import Samples, to_device
from .order import uniforms
from .source import SourceConfig, cached, fingerprint, load_splits, source_state

DIGITS = "digits"
_CACHE_FORMAT = 1  # raise it when the files' content changes
_RESIDENT_BYTES = 1 << 31  # of decoded training images, at most
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass
class VisionConfig(SourceConfig):
    """Where images come from and how they become batches."""

    runtime: ClassVar[frozenset[str]] = frozenset(("image_column", "label_column", "num_workers"))
    builtin: ClassVar[str] = DIGITS
    builders: ClassVar[dict[str, str]] = {
        ".parquet": "parquet",
        **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "imagefolder"),
    }

    dataset: str = option(
        DIGITS,
        "Hub dataset id, local folder (images in a folder for each class, or parquet), or digits: scikit-learn's.",
    )
    image_column: str | None = option(None, "Column that holds the images; by default the first one of images.")
    label_column: str | None = option(None, "Column that holds the classes; by default the first one of classes.")
    image_size: int | None = option(
        None, "Height and width; by default those of the data where all are alike, and otherwise what the model takes."
    )
    resident: bool | None = option(
        None, "Keep decoded images on the device; by default where all have one size and take at most 2 GiB."
    )
    crop_padding: int = option(0, "Zeros around resident images, from which training takes random crops.")
    crop_min_scale: float = option(1.0, "Smallest share of an image's area in random crops of images not resident.")
    crop_pct: float | None = option(
        None,
        "Share of the shorter side that evaluation sees of images not resident; by default what the model says, or 1.",
    )
    flip: bool = option(False, "Flip training images from left to right at random.")
    num_workers: int = option(8, "Threads that decode images, in each process.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, when a value makes no sense."""
        super().validate()
        at_least(self, 0, "crop_padding")
        at_least(self, 1, "num_workers")
        if self.image_size is not None:
            at_least(self, 1, "image_size")
        for name in ("crop_min_scale", "crop_pct"):
            share = getattr(self, name)
            require(share is None or 0 < share <= 1, name, share, "above 0 and at most 1")


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


@dataclass
class ImageData:
    """Image data.

    Attributes:
        train: Samples to train on.
        validation: Samples to evaluate on.
        classes: Their names.
        image_size: Height and width of what the model gets.
        normalisation: Of pixels.
        facts: For the record: numbers of images, how validation images were chosen, and a SHA-256, `hash`.
    """

    train: Samples
    validation: Samples
    classes: list[str]
    image_size: int
    normalisation: Normalisation
    facts: dict[str, Any]


def prepare_images(
    config: VisionConfig,
    seed: int,
    device: torch.device,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """The images of `config`.

    Args:
        config: Which, and how they are augmented.
        seed: Of the augmentation.
        device: Where resident images are kept.
        preprocessing: What the model takes. By default, pixels are normalised by the statistics of the training images
            where these are resident, and by those of ImageNet otherwise.

    Raises:
        DataError: the dataset cannot be read, has no such columns, or cannot be kept as asked for; or the cache cannot
            be written.
    """
    splits = _digits(config) if config.dataset == DIGITS else _read(config)
    wanted = preprocessing or Preprocessing()
    size = config.image_size or wanted.image_size
    resident = splits.can_be_resident(size) if config.resident is None else config.resident
    if resident:
        return _resident(config, splits, seed, device, wanted.normalisation, size)
    if config.crop_padding:
        raise DataError(
            f"--crop_padding {config.crop_padding} is for resident images, and those of {config.dataset!r} are too "
            "large, or not all of one size; use --crop_min_scale, or --resident yes"
        )
    size = size or 224
    normalisation = wanted.normalisation or Normalisation(*_IMAGENET)
    crop: dict[str, Any] = {"size": size, "normalisation": normalisation, "seed": seed}
    crop["num_workers"] = config.num_workers
    train = DecodedImages(splits.train, **crop, min_scale=config.crop_min_scale, flip=config.flip)
    validation = DecodedImages(splits.validation, **crop, crop_pct=config.crop_pct or wanted.crop_pct)
    # All pixels would take hours to read. Of files, names and sizes stand for them; of a Hub dataset, its revision.
    files = [[Path(name).name, size] for name, size, _ in fingerprint(config.dataset) or []]
    source = [config.dataset_config, config.dataset_revision, config.image_column, files or config.dataset]
    digest = hashlib.sha256(json.dumps(source).encode() + splits.label_bytes())
    facts = splits.facts(digest.hexdigest(), "labels, and names and sizes of files", size)
    return ImageData(train, validation, splits.classes, size, normalisation, facts)


# ---- reading


@dataclass
class Rows:
    """Some images of a dataset, encoded.

    Attributes:
        source: Anything with a length whose item k is encoded bytes, a path, or an array of uint8.
        labels: int64, one for each.
    """

    source: Callable[[int], Any]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Any:
        """One of them as a PIL image in RGB, or as it is where it is grey.

        Raises:
            DataError: it cannot be read.
        """
        from PIL import Image, ImageOps

        try:
            item = self.source(index)
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else Image.open(item)
            image = ImageOps.exif_transpose(image)
            return image if image.mode == "L" else image.convert("RGB")
        except Exception as error:  # of the file system and of each format's reader
            raise DataError(f"image {index} of the dataset cannot be read: {type(error).__name__}: {error}") from error


@dataclass
class _Splits:
    train: Rows
    validation: Rows
    classes: list[str]
    held_out: str  # `split`, one of the dataset's own, or `random`
    on_hub: bool

    def label_bytes(self) -> bytes:
        """All labels and the names of the classes, to be hashed."""
        return self.train.labels.tobytes() + self.validation.labels.tobytes() + json.dumps(self.classes).encode()

    def facts(self, digest: str, hash_of: str, image_size: int) -> dict[str, Any]:
        """What the record says of the data."""
        counts = {"train": len(self.train), "validation": len(self.validation)}
        sizes = {"image_size": image_size, "num_classes": len(self.classes)}
        return {
            "hash": digest,
            "hash_of": hash_of,
            "num_images": counts,
            "held_out": self.held_out,
            "on_hub": self.on_hub,
            **sizes,
        }

    def can_be_resident(self, size: int | None) -> bool:
        """Judged by some images; that all are alike turns out when they are decoded."""
        sizes = {self.train.image(int(i)).size for i in np.linspace(0, len(self.train) - 1, 16)}
        (width, height), *others = sizes
        alike = not others and width == height and size in (None, width)
        return alike and 3 * width * height * len(self.train) <= _RESIDENT_BYTES


def _digits(config: VisionConfig) -> _Splits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    chosen = _held_out(len(images), config.validation_fraction)
    train, validation = (
        Rows(images[part].__getitem__, digits.target[part].astype(np.int64)) for part in (~chosen, chosen)
    )
    return _Splits(train, validation, [str(name) for name in digits.target_names], "random", False)


def _held_out(count: int, fraction: float) -> np.ndarray:
    """Which samples are for validation, always the same."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[: max(1, round(fraction * count))]] = True
    return chosen


def _read(config: VisionConfig) -> _Splits:
    import datasets

    loaded = load_splits(config)
    train = loaded[config.train_split]
    image = config.image_column or _first_column(config, train, "image", datasets.Image)
    label = config.label_column or _first_column(config, train, "label", datasets.ClassLabel)
    for name in (image, label):
        if name not in train.column_names:
            raise DataError(
                f"{config.dataset!r} has no column {name!r}; its columns are {', '.join(train.column_names)}"
            )
    feature = train.features[label]
    names = getattr(feature, "names", None) or sorted(set(train[label]))
    numbers = {name: number for number, name in enumerate(names)}

    def rows(table: Any) -> Rows:
        labels = np.array(
            [value if hasattr(feature, "names") else numbers.get(value, -1) for value in table[label]], np.int64
        )
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(names):
            raise DataError(
                f"column {label!r} of {config.dataset!r} has images without one of its {len(names)} classes, or none "
                "at all; name another split or column"
            )
        encoded = table.cast_column(image, datasets.Image(decode=False)).select_columns(image)

        def source(index: int) -> Any:
            item = encoded[index][image]
            return io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]

        return Rows(source, labels)

    if config.validation_split in loaded:
        parts, held_out = (train, loaded[config.validation_split]), "split"
    else:
        chosen = _held_out(len(train), config.validation_fraction)
        parts, held_out = (train.select(np.flatnonzero(~chosen)), train.select(np.flatnonzero(chosen))), "random"
    return _Splits(rows(parts[0]), rows(parts[1]), [str(name) for name in names], held_out, config.on_hub)


def _first_column(config: VisionConfig, table: Any, what: str, kind: type) -> str:
    """The first column of a kind; for labels, the only other one would do too."""
    found = [str(name) for name, feature in table.features.items() if isinstance(feature, kind)]
    others = [name for name, feature in table.features.items() if type(feature).__name__ == "Value"]
    if found or (what == "label" and len(others) == 1):
        return (found or others)[0]
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())
    raise DataError(
        f"which column of {config.dataset!r} is the {what} cannot be told from {columns}; name --{what}_column"
    )


# ---- resident images


@dataclass
class ResidentImages:
    """Decoded images on a device.

    Attributes:
        images: uint8 of shape (images, channels, height, width), with one channel or three.
        labels: int64, on the CPU.
        normalisation: Of pixels.
        seed: Of the augmentation.
        padding: Zeros, which after normalisation are the mean colour, around images from which crops are taken.
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
        """`pixel_values`, float32 of shape (len(indices), 3, height, width) on the device, and `labels`."""
        device = self.images.device
        pixels = self.normalisation(self.images[to_device(torch.from_numpy(np.asarray(indices)), device)])
        if draws is not None and (self.padding or self.flip):
            pixels = self._augment(pixels, uniforms((self.seed, 2), draws, (3,)))
        return {"pixel_values": pixels, "labels": self.labels[torch.from_numpy(np.asarray(indices))]}

    def _augment(self, pixels: Tensor, random: np.ndarray) -> Tensor:
        height, width = pixels.shape[-2:]
        top, left = (random[:, :2] * (2 * self.padding + 1)).astype(np.int64).T
        rows = top[:, None] + np.arange(height)
        columns = left[:, None] + np.arange(width)
        if self.flip:
            columns = np.where(random[:, 2:] < 0.5, columns[:, ::-1], columns)
        padded = F.pad(pixels, [self.padding] * 4)
        rows, columns = (to_device(torch.from_numpy(part.copy()), pixels.device) for part in (rows, columns))
        each = torch.arange(len(pixels), device=pixels.device)[:, None, None]
        crops = padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        # The channels are last in memory, which suits a GPU. On a CPU, the backward pass of a 1 x 1 convolution with
        # stride 2 and few channels then corrupts the heap (torch 2.14).
        return crops.contiguous() if crops.device.type == "cpu" else crops


def _resident(
    config: VisionConfig,
    splits: _Splits,
    seed: int,
    device: torch.device,
    normalisation: Normalisation | None,
    wanted: int | None,
) -> ImageData:
    labels_hash = hashlib.sha256(splits.label_bytes()).hexdigest()  # of a dataset whose order has changed on the Hub
    key = [_CACHE_FORMAT, source_state(config), config.image_column, config.label_column, labels_hash]
    folder, meta = cached(config, "images", key, lambda folder: _decode_all(config, splits, folder))
    images = {split: np.load(folder / f"{split}.npy") for split in ("train", "validation")}
    size = images["train"].shape[-1]
    if images["train"].shape[-2] != size or wanted not in (None, size):
        raise DataError(
            f"the images of {config.dataset!r} are {images['train'].shape[-2]} x {size}, and resident ones are not "
            f"scaled, to {wanted or 'squares'} or any other size; use --resident no with an --image_size"
        )
    normalisation = normalisation or Normalisation(meta["mean"], meta["std"])

    def resident(split: str, labels: np.ndarray, **augmentation: Any) -> ResidentImages:
        pixels = torch.from_numpy(images[split]).to(device)
        return ResidentImages(pixels, torch.from_numpy(labels), normalisation, seed, **augmentation)

    train = resident("train", splits.train.labels, padding=config.crop_padding, flip=config.flip)
    validation = resident("validation", splits.validation.labels)
    return ImageData(
        train, validation, splits.classes, size, normalisation, splits.facts(meta["hash"], "images and labels", size)
    )


def _decode_all(config: VisionConfig, splits: _Splits, folder: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    moments: tuple[list[float], list[float]] = ([], [])
    for split, rows in (("train", splits.train), ("validation", splits.validation)):
        with ThreadPoolExecutor(config.num_workers) as pool:
            decoded = pool.map(lambda index, rows=rows: np.asarray(rows.image(index)), range(len(rows)))
            arrays = list(tqdm(decoded, total=len(rows), desc=f"Decoding {split}", unit=" images", unit_scale=True))
        if any(array.ndim == 3 for array in arrays):  # grey ones among others
            arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, -1) for array in arrays]
        shapes = {array.shape for array in arrays}
        if len(shapes) > 1:
            raise DataError(
                f"the images of {config.dataset!r} have {len(shapes)} shapes, {sorted(shapes)[0]} and "
                f"{sorted(shapes)[-1]} among them, and resident ones must have one; use --resident no"
            )
        images = np.stack([array.reshape(*array.shape[:2], -1) for array in arrays]).transpose(0, 3, 1, 2)
        images = np.ascontiguousarray(images)
        np.save(folder / f"{split}.npy", images)
        digest.update(images.tobytes() + rows.labels.tobytes())
        if split == "train":
            counts = np.stack([np.bincount(channel.reshape(-1), minlength=256) for channel in images.swapaxes(0, 1)])
            share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
            mean = share @ value
            std = np.sqrt(share @ value**2 - mean**2)
            moments = (np.resize(mean, 3).tolist(), np.resize(std, 3).tolist())
    return {"hash": digest.hexdigest(), "mean": moments[0], "std": moments[1]}


# ---- images that are decoded when they are needed


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
        """`pixel_values`, float32 of shape (len(indices), 3, size, size), and `labels`."""
        random: Any = [None] * len(indices) if draws is None else uniforms((self.seed, 3), draws, (5,))
        arrays = list(self._pool.map(self._load, indices, random))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        return {"pixel_values": self.normalisation(pixels), "labels": torch.from_numpy(self.labels[indices])}

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


def image_processor(data: ImageData) -> Any:
    """What makes model inputs of images as evaluation does, for `save_pretrained` beside the model."""
    from transformers import BitImageProcessor

    crop_pct = data.validation.crop_pct if isinstance(data.validation, DecodedImages) else 1.0
    return BitImageProcessor(
        size={"shortest_edge": round(data.image_size / crop_pct)},
        crop_size={"height": data.image_size, "width": data.image_size},
        image_mean=list(data.normalisation.mean),
        image_std=list(data.normalisation.std),
        resample=3,  # bicubic
    )


def preprocessing_of(model: str) -> Preprocessing:
    """What a pretrained model takes.

    Args:
        model: The name or folder of one that has an image processor of transformers, or is timm's.

    Raises:
        DataError: it has none that can be read.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model)
        if timm := getattr(processor, "data_config", None):
            return Preprocessing(Normalisation(timm["mean"], timm["std"]), timm["input_size"][-1], timm["crop_pct"])
        crops = getattr(processor, "do_center_crop", False)
        size = processor.crop_size if crops else processor.size
        side, edge = int(size.get("height") or size["shortest_edge"]), processor.size.get("shortest_edge")
        share = min(1.0, side / edge) if crops and edge else 1.0
        return Preprocessing(Normalisation(processor.image_mean, processor.image_std), side, share)
    except Exception as error:  # the Hub client, JSON and the processors raise their own
        raise DataError(
            f"how {model!r} takes its images cannot be read: {type(error).__name__}: {error}. --model takes "
            "timm/<name>, a Hub id, or a folder with a model and its image processor"
        ) from error
