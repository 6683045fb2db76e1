"""Reads the encoded images and classes of a dataset, and splits off those that are held out."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ...files import shown
from ..config import at_least, option, require
from ..errors import DataError, reason
from ..task import Samples
from .normalisation import Normalisation
from .source import SourceConfig, load_splits

DIGITS = "digits"
# Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0;
# the same 1797 images of 8 x 8 pixels as in scikit-learn, stored as bytes.
_DIGITS_FILE = Path(__file__).parent / "digits.npz"


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
        "Hub dataset id, local folder (one subfolder of images per class, or parquet), file NAME.npz with the arrays "
        "x_train, y_train and so on, or digits: the handwritten digits of scikit-learn.",
    )
    image_column: str | None = option(None, "Column with the images; by default the first image column.")
    label_column: str | None = option(None, "Column with the classes; by default the first class column.")
    image_size: int | None = option(
        None,
        "Height and width; by default those that the model expects, if it says so, or else those of the images if they "
        "are all equal, or else 224.",
    )
    resident: bool | None = option(
        None,
        "Keep decoded images on the device, scaled once to squares if --image_size is given; by default if all images "
        "have that size and take at most 2 GiB.",
    )
    crop_padding: int = option(0, "Pixels of zero padding around resident images, for random crops in training.")
    crop_min_scale: float = option(1.0, "Smallest share of the area in random crops of images that are not resident.")
    crop_pct: float | None = option(
        None,
        "Share of the shorter side that evaluation crops from images that are not resident, or of both sides if the "
        "model squashes images into squares; by default the model's, or 1.",
    )
    flip: bool = option(False, "Flip training images horizontally at random.")
    num_workers: int = option(8, "Number of threads per process that decode images.")

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
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
    """Encoded images of a dataset, with their labels.

    Attributes:
        source: Returns image k as a file of encoded bytes, a path, or an array of uint8.
        labels: The label of each image, int64.
    """

    source: Callable[[int], Any]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Any:
        """Returns an image as a PIL image in RGB, or in mode L if it is grey.

        Raises:
            DataError: The image cannot be read, or has more than 8 bits a channel.
        """
        from PIL import Image, ImageOps

        name = f"image {index} of the dataset"
        try:
            item = self.source(index)
            name = item if isinstance(item, str) else name
            image = Image.fromarray(item) if isinstance(item, np.ndarray) else Image.open(item)
            if image.mode.startswith(("I", "F")):  # where conversion to RGB would clip at 255
                raise ValueError(f"its mode {image.mode} has more than 8 bits a channel. Scale its values to 0 to 255")
            image = ImageOps.exif_transpose(image)
            return image if image.mode == "L" else image.convert("RGB")
        except Exception as error:  # the file system and the reader of each format raise their own
            raise DataError(
                f"cannot read {name}: {reason(error)}. Replace it, or remove it from the dataset."
            ) from error


@dataclass
class ImageSplits:
    """The images to train and evaluate on.

    Attributes:
        parts: The images of `train`, `validation`, and `test` if requested.
        classes: Names of the classes.
        held_out: Where the validation images come from: `split`, a split of the dataset, or `random`.
        on_hub: Whether the dataset is on the Hub.
    """

    parts: dict[str, Rows]
    classes: list[str]
    held_out: str
    on_hub: bool

    def label_bytes(self) -> bytes:
        """Returns all labels and class names as bytes to hash."""
        return b"".join(rows.labels.tobytes() for rows in self.parts.values()) + json.dumps(self.classes).encode()

    def facts(self, digest: str, hash_of: str, image_size: int) -> dict[str, Any]:
        """Returns the facts about the data for the record."""
        counts = {name: len(rows) for name, rows in self.parts.items()}
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
        test: Samples to evaluate on once, at the end, or None.
        classes: Names of the classes.
        image_size: Height and width of the model's inputs.
        normalisation: Normalisation of pixels.
        facts: Facts for the record: numbers of images, how validation images were chosen, and a SHA-256, `hash`.
    """

    train: Samples
    validation: Samples
    test: Samples | None
    classes: list[str]
    image_size: int
    normalisation: Normalisation
    facts: dict[str, Any]


def read_splits(config: VisionConfig) -> ImageSplits:
    """Reads the images of a dataset without decoding them.

    Raises:
        ConfigError: A package that is needed to read the dataset is not installed.
        DataError: The dataset cannot be read, lacks the named columns, or has too few images.
    """
    if config.dataset == DIGITS:
        return _read_arrays(config, _DIGITS_FILE)
    return _read_arrays(config, Path(config.dataset)) if config.dataset.endswith(".npz") else _read(config)


def _read_arrays(config: VisionConfig, path: Path) -> ImageSplits:
    """Reads images from arrays: uint8 `x_train` (images, height, width), perhaps with channels last, and `y_train`."""
    try:
        with np.load(path) as file:
            found = {name.removeprefix("x_"): (file[name], file[f"y_{name[2:]}"]) for name in file if name[:2] == "x_"}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"cannot read {path}: {error}. It must hold the arrays x_train, y_train and so on. Save it again with "
            "numpy.savez."
        ) from error
    if config.train_split not in found:
        raise DataError(
            f"{path} has no array {shown(f'x_{config.train_split}')}. Its splits are {', '.join(found) or 'none'}. "
            "Name one with --train_split."
        )
    images, labels = _checked(path, *found[config.train_split])
    classes = np.unique(labels)
    shares = config.held_out(found)
    arrays = {part: (images[chosen], labels[chosen]) for part, chosen in hold_out(len(images), shares).items()}
    arrays |= {part: _checked(path, *found[split]) for part, split in config.own_splits(shares).items()}
    _check_parts(config, {part: y for part, (_, y) in arrays.items()}, classes)
    parts = {part: Rows(x.__getitem__, np.searchsorted(classes, y)) for part, (x, y) in arrays.items()}
    return ImageSplits(parts, [str(name) for name in classes], _held_out(shares), False)


def _check_parts(config: VisionConfig, labels: Mapping[str, np.ndarray], known: np.ndarray) -> None:
    """Checks that each part has images, and only of classes that the training split has.

    Args:
        config: The config with the dataset.
        labels: Part -> the classes of its images.
        known: All classes of the training split.
    """
    for part, classes in labels.items():
        if len(classes) == 0:
            counts = ", ".join(f"{len(of_part)} {name}" for name, of_part in labels.items())
            raise DataError(
                f"{shown(config.dataset)} has too few {part} images: {counts}. Each part needs at least one. Add some, "
                f"or name another --{part}_split."
            )
        if not np.isin(classes, known).all():
            raise DataError(
                f"{shown(config.dataset)} has {part} images of classes that do not occur in its split "
                f"{shown(config.train_split)}. Training images must cover all classes. Add some, or remove the others."
            )


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks the arrays of a file. Returns grey images without a channel dimension, and classes in one dimension."""
    colours = images.ndim == 4 and images.shape[-1] in (1, 3)
    sound = images.dtype == np.uint8 and (images.ndim == 3 or colours) and 0 not in images.shape[1:]
    if not sound or len(images) != labels.size:
        raise DataError(
            f"{path} has {images.dtype} images of shape {images.shape} and {labels.size} classes. Images must be uint8 "
            "of shape (images, height, width), not 0 x 0, with or without a last dimension of 1 or 3 channels, and "
            "each needs a class. Convert the arrays."
        )
    return images[..., 0] if images.shape[3:] == (1,) else images, labels.reshape(-1)


def hold_out(count: int, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Splits samples at random, always in the same way, and returns the ascending indices of each part.

    Args:
        count: Total number of samples.
        shares: Part -> the share of all samples that it holds out. The rest is `train`.
    """
    order, parts = np.random.default_rng(0).permutation(count), {}
    for part, share in shares.items():
        size = max(1, round(share * count))
        parts[part], order = np.sort(order[:size]), order[size:]
    return {"train": np.sort(order), **parts}


def _held_out(shares: Mapping[str, float]) -> str:
    return "random" if "validation" in shares else "split"


def _read(config: VisionConfig) -> ImageSplits:
    loaded = load_splits(config)
    import datasets

    train = loaded[config.train_split]
    image = config.image_column or _first_column(config, train, "image", datasets.Image)
    label = config.label_column or _first_column(config, train, "label", datasets.ClassLabel)
    for name in (image, label):
        if name not in train.column_names:
            raise DataError(
                f"{shown(config.dataset)} has no column {shown(name)}. Its columns are "
                f"{', '.join(train.column_names)}. Name one with --image_column or --label_column."
            )
    feature = train.features[label]
    if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
        raise DataError(
            f"column {shown(label)} of {shown(config.dataset)} holds no classes, but {type(feature).__name__}. A class "
            "is a name or a number. Name another --label_column."
        )
    names = getattr(feature, "names", None)
    values = range(len(names)) if names else sorted(set(train[label]) - {None})
    numbers = {value: number for number, value in enumerate(values)}

    def rows(table: Any) -> Rows:
        labels = np.array([numbers.get(value, -1) for value in table[label]], np.int64)
        if (labels < 0).any():
            raise DataError(
                f"column {shown(label)} of {shown(config.dataset)} has values, perhaps null, that are none of its "
                f"{len(values)} classes. Every image needs a class. Name another split or column, or remove these "
                "images."
            )
        return Rows(_encoded(config, table, image), labels)

    shares = config.held_out(loaded)
    tables = {part: train.select(chosen) if shares else train for part, chosen in hold_out(len(train), shares).items()}
    own = config.own_splits(shares)
    tables |= {part: loaded[split] for part, split in own.items()}
    parts = {part: rows(table) for part, table in tables.items()}
    labels = {part: rows_of_part.labels for part, rows_of_part in parts.items()}
    _check_parts(config, labels, np.concatenate([labels[part] for part in labels if part not in own]))
    return ImageSplits(parts, [str(name) for name in names or values], _held_out(shares), config.on_hub)


def _encoded(config: VisionConfig, table: Any, column: str) -> Callable[[int], Any]:
    """Returns the source of `Rows` for a column of images."""
    import datasets

    try:
        encoded = table.cast_column(column, datasets.Image(decode=False)).select_columns(column)
    except Exception as error:  # Arrow raises its own for each pair of types
        raise DataError(
            f"column {shown(column)} of {shown(config.dataset)} holds no images: {reason(error)}. Name another "
            "--image_column."
        ) from error

    def source(index: int) -> Any:
        item = encoded[index][column]
        return io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]

    return source


def _first_column(config: VisionConfig, table: Any, what: str, kind: type) -> str:
    """Finds the first column of a kind. For labels, a single plain column is accepted too."""
    found = [str(name) for name, feature in table.features.items() if isinstance(feature, kind)]
    others = [name for name, feature in table.features.items() if type(feature).__name__ == "Value"]
    if found or (what == "label" and len(others) == 1):
        return (found or others)[0]
    columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in table.features.items())
    raise DataError(
        f"cannot tell which column of {shown(config.dataset)} holds the {what}. It has the columns {columns}. Name one "
        f"with --{what}_column."
    )
