"""Images of a dataset, encoded as they come, with their classes: which there are, and which of them are held out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..config import at_least, option, require
from ..errors import DataError
from ..task import Samples
from .normalisation import Normalisation
from .source import SourceConfig, load_splits

DIGITS = "digits"


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
class ImageSplits:
    """The images to train and to evaluate on.

    Attributes:
        train: To train on.
        validation: To evaluate on.
        classes: Their names.
        held_out: Where those for validation come from: `split`, one of the dataset's own, or `random`.
        on_hub: Whether the dataset is one of the Hub.
    """

    train: Rows
    validation: Rows
    classes: list[str]
    held_out: str
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


@dataclass
class ImageData:
    """Image data, ready for training.

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


def read_splits(config: VisionConfig) -> ImageSplits:
    """The images of a dataset, not decoded yet.

    Raises:
        DataError: it cannot be read, or has no such columns.
    """
    return _digits(config) if config.dataset == DIGITS else _read(config)


def _digits(config: VisionConfig) -> ImageSplits:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    chosen = hold_out(len(images), config.validation_fraction)
    train, validation = (
        Rows(images[part].__getitem__, digits.target[part].astype(np.int64)) for part in (~chosen, chosen)
    )
    return ImageSplits(train, validation, [str(name) for name in digits.target_names], "random", False)


def hold_out(count: int, fraction: float) -> np.ndarray:
    """Which samples are for validation, always the same."""
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng(0).permutation(count)[: max(1, round(fraction * count))]] = True
    return chosen


def _read(config: VisionConfig) -> ImageSplits:
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
        chosen = hold_out(len(train), config.validation_fraction)
        parts, held_out = (train.select(np.flatnonzero(~chosen)), train.select(np.flatnonzero(chosen))), "random"
    return ImageSplits(rows(parts[0]), rows(parts[1]), [str(name) for name in names], held_out, config.on_hub)


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
