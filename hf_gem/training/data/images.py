"""Images of a dataset, encoded as they come, with their classes: which there are, and which of them are held out."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..config import at_least, option, require
from ..errors import DataError
from ..task import Samples
from .normalisation import Normalisation
from .source import SourceConfig, load_splits

DIGITS = "digits"
# Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, CC BY 4.0;
# the 1797 images of 8 x 8 pixels that scikit-learn has too, as bytes.
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
        "Hub dataset id, local folder (images in a folder for each class, or parquet), file NAME.npz with the arrays "
        "x_train, y_train and so on, or digits: the handwritten digits of scikit-learn.",
    )
    image_column: str | None = option(None, "Column that holds the images; by default the first one of images.")
    label_column: str | None = option(None, "Column that holds the classes; by default the first one of classes.")
    image_size: int | None = option(
        None, "Height and width; by default those of the data where all are alike, and otherwise what the model takes."
    )
    resident: bool | None = option(
        None,
        "Keep decoded images on the device, scaled once where an --image_size is given; by default where all have that "
        "size and take at most 2 GiB.",
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
        parts: `train`, `validation`, and `test` where that was asked for.
        classes: Their names.
        held_out: Where those for validation come from: `split`, one of the dataset's own, or `random`.
        on_hub: Whether the dataset is one of the Hub.
    """

    parts: dict[str, Rows]
    classes: list[str]
    held_out: str
    on_hub: bool

    def label_bytes(self) -> bytes:
        """All labels and the names of the classes, to be hashed."""
        return b"".join(rows.labels.tobytes() for rows in self.parts.values()) + json.dumps(self.classes).encode()

    def facts(self, digest: str, hash_of: str, image_size: int) -> dict[str, Any]:
        """What the record says of the data."""
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
        test: Samples to evaluate on once, at the end; None without a test.
        classes: Their names.
        image_size: Height and width of what the model gets.
        normalisation: Of pixels.
        facts: For the record: numbers of images, how validation images were chosen, and a SHA-256, `hash`.
    """

    train: Samples
    validation: Samples
    test: Samples | None
    classes: list[str]
    image_size: int
    normalisation: Normalisation
    facts: dict[str, Any]


def read_splits(config: VisionConfig) -> ImageSplits:
    """The images of a dataset, not decoded yet.

    Raises:
        ConfigError: a package is needed for it that is not installed.
        DataError: it cannot be read, or has no such columns.
    """
    if config.dataset == DIGITS:
        return _read_arrays(config, _DIGITS_FILE)
    return _read_arrays(config, Path(config.dataset)) if config.dataset.endswith(".npz") else _read(config)


def _read_arrays(config: VisionConfig, path: Path) -> ImageSplits:
    """Images as arrays: uint8 `x_train` of shape (images, height, width) or with channels last, classes `y_train`."""
    try:
        with np.load(path) as file:
            found = {name.removeprefix("x_"): (file[name], file[f"y_{name[2:]}"]) for name in file if name[:2] == "x_"}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}. It needs the arrays x_train, y_train and so on") from error
    if config.train_split not in found:
        raise DataError(
            f"{path} has no x_{config.train_split}; --train_split can be {' or '.join(found) or 'none there is'}"
        )
    images, labels = _checked(path, *found[config.train_split])
    classes = np.unique(labels)
    shares = config.held_out(found)
    arrays = {part: (images[chosen], labels[chosen]) for part, chosen in hold_out(len(images), shares).items()}
    arrays |= {part: _checked(path, *found[split]) for part, split in config.own_splits(shares).items()}
    for part, (_, classes_of_part) in arrays.items():
        if not np.isin(classes_of_part, classes).all():
            raise DataError(f"{path} has {part} images of classes that are not in x_{config.train_split}")
    parts = {part: Rows(x.__getitem__, np.searchsorted(classes, y)) for part, (x, y) in arrays.items()}
    return ImageSplits(parts, [str(name) for name in classes], _held_out(shares), False)


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of a file, grey images without a dimension for channels, and classes in one dimension."""
    colours = images.ndim == 4 and images.shape[-1] in (1, 3)
    if images.dtype != np.uint8 or not (images.ndim == 3 or colours) or len(images) != labels.size:
        raise DataError(
            f"{path} has {images.dtype} images of shape {images.shape} and {labels.size} classes. Images are uint8, of "
            "shape (images, height, width), or with 1 or 3 channels behind, and each has a class"
        )
    return images[..., 0] if images.shape[3:] == (1,) else images, labels.reshape(-1)


def hold_out(count: int, shares: Mapping[str, float]) -> dict[str, np.ndarray]:
    """The indices of the samples of each part, always the same, ascending; what no part holds out is `train`.

    Args:
        count: Samples in all.
        shares: Part -> the share of all samples that it holds out.
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

    shares = config.held_out(loaded)
    tables = {part: train.select(chosen) if shares else train for part, chosen in hold_out(len(train), shares).items()}
    tables |= {part: loaded[split] for part, split in config.own_splits(shares).items()}
    parts = {part: rows(table) for part, table in tables.items()}
    return ImageSplits(parts, [str(name) for name in names], _held_out(shares), config.on_hub)


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
