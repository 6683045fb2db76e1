"""Prepared data as they lie in a folder, which may be of any origin: no pickles, and every size is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from ..errors import DataError

ENDS = "{}.documents.npy"  # where each document ends


class _LaterInText(TypedDict, total=False):
    num_documents: dict[str, int]


class TextContent(_LaterInText):
    """What is known of prepared text."""

    hash: str
    num_tokens: dict[str, int]
    held_out: str
    shares: dict[str, float]
    vocab_size: int
    dtype: Literal["uint16", "uint32"]


class ImageContent(TypedDict):
    """What is known of prepared images."""

    hash: str
    mean: list[float]
    std: list[float]


def read_tokens(folder: Path, split: str, content: dict[str, Any]) -> np.ndarray:
    """All token ids of a split, memory-mapped.

    Args:
        folder: Of prepared text.
        split: One of its splits.
        content: Its `TextContent`.

    Raises:
        DataError: the file cannot be read, or has another number of tokens.
    """
    path, dtype = folder / f"{split}.bin", np.dtype(content["dtype"])
    expected = content["num_tokens"][split] * dtype.itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise ValueError(f"it has {size} bytes, and {content['num_tokens'][split]} tokens take {expected}")
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"the tokens in {path} cannot be read: {error}; copy or prepare the folder again") from error


def read_ends(folder: Path, split: str, content: dict[str, Any]) -> np.ndarray:
    """Where each document of a split ends, int64, ascending.

    Args:
        folder: As in `read_tokens`.
        split: Likewise.
        content: Likewise.

    Raises:
        DataError: the file cannot be read, or these are not the ends of such documents.
    """
    path = folder / ENDS.format(split)
    ends, size = read_array(path, np.int64, 1), content["num_tokens"][split]
    if not len(ends) or ends[0] < 1 or ends[-1] != size or (np.diff(ends) < 1).any():
        raise DataError(
            f"{path} does not have the ends of documents of {size} tokens; copy or prepare the folder again"
        )
    return ends


def read_array(path: Path, dtype: Any, dimensions: int) -> np.ndarray:
    """An array of some type, as a copy in memory.

    Args:
        path: A file of numpy's.
        dtype: The type it has to have.
        dimensions: Likewise.

    Raises:
        DataError: it has not, or cannot be read.
    """
    try:
        array = np.load(path, mmap_mode="r")  # which reads no more than there is, whatever the head of the file says
        if array.dtype != dtype or array.ndim != dimensions:
            raise ValueError(f"it is an array of {array.dtype} in {array.ndim} dimensions")
        return np.array(array)
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, SyntaxError) as error:
        wanted = f"{np.dtype(dtype).name} in {dimensions} dimensions"
        raise DataError(f"{path} cannot be read as {wanted}: {error}; copy or prepare the folder again") from error
