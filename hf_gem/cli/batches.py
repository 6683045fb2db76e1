"""Reads batches for `hf-gem convert --eps fit` and `--eps match` from text, images or arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..training.errors import DataError
from .loading import Source, processor

_LENGTH = 128  # maximum number of tokens in a sequence
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Batch = dict[str, Tensor] | Tensor


def read(path: Path, model: nn.Module, source: Source, count: int, size: int) -> list[Batch]:
    """Reads batches of a model's inputs.

    Args:
        path: Folder of images, `.npz` file with an array for each argument of the model (samples along the first axis),
            or any other file, which is read as text.
        model: The model that takes the batches.
        source: Where the model, its tokenizer and its image processor come from.
        count: Maximum number of batches.
        size: Number of samples in a batch.

    Raises:
        DataError: There is too little data, or it cannot be read.
    """
    if not path.exists():
        raise DataError(f"there is no data at {path}. Give a text file, a folder of images or an .npz file.")
    try:
        if path.suffix == ".npz":
            samples = _of_arrays(path)
        elif path.is_dir():
            samples = _of_images(path, model, source)
        else:
            samples = _of_text(path, model, source)
        batches = [_stacked(part) for part in itertools.islice(_parts(samples, size), count)]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"the data at {path} cannot be used: {error}") from error
    if not batches:
        raise DataError(f"the data at {path} is less than one batch of {size} samples. Use more, or a smaller batch.")
    return batches


def _parts(samples: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yields lists of `size` samples. Drops the remaining samples."""
    while len(part := list(itertools.islice(samples, size))) == size:
        yield part


def _stacked(samples: Sequence[Any]) -> Batch:
    if isinstance(samples[0], Tensor):
        return torch.stack(list(samples))
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def _of_arrays(path: Path) -> Iterator[dict[str, Tensor]]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    for index in range(min(map(len, arrays.values()))):
        yield {name: array[index] for name, array in arrays.items()}


def _of_text(path: Path, model: nn.Module, source: Source) -> Iterator[dict[str, Tensor]]:
    if source.library == "timm":
        raise DataError("a model of timm takes images, and this is a file of text. Give a folder of images.")
    try:
        tokenizer = processor(source, "AutoTokenizer", "tokenizer")
    except DataError as error:
        raise DataError(
            f"{error} A text file needs one. Put its tokenizer there, or give an .npz file with an array of input_ids."
        ) from error
    text = path.read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    longest: Any = getattr(model.config, "max_position_embeddings", None) or _LENGTH
    for sequence in ids.split(min(_LENGTH, int(longest)))[:-1]:  # the last one is shorter
        yield {"input_ids": sequence, "attention_mask": torch.ones_like(sequence)}


def _of_images(path: Path, model: nn.Module, source: Source) -> Iterator[Any]:
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _IMAGES)
    transform: Any
    if source.library == "timm":
        import timm.data

        transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    else:
        prepare = processor(source, "AutoImageProcessor", "image processor")

        def transform(image: Any) -> dict[str, Tensor]:
            return {"pixel_values": prepare(image, return_tensors="pt")["pixel_values"][0]}

    for file in files:
        with Image.open(file) as image:
            yield transform(image.convert("RGB"))
