"""Reads prepared data from a folder, which may be untrusted: no pickles, and every size is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np

from ..errors import DataError

ENDS = "{}.documents.npy"  # the positions where documents end


class _LaterInText(TypedDict, total=False):
    num_documents: dict[str, int]


class TextContent(_LaterInText):
    """Facts about prepared text."""

    hash: str
    num_tokens: dict[str, int]
    held_out: str
    shares: dict[str, float]
    vocab_size: int
    dtype: Literal["uint16", "uint32"]


class ImageContent(TypedDict):
    """Facts about prepared images."""

    hash: str
    mean: list[float]
    std: list[float]


def read_tokens(folder: Path, split: str, content: dict[str, Any]) -> np.ndarray:
    """Maps the token ids of a split into memory.

    Args:
        folder: Folder of prepared text.
        split: Name of the split.
        content: The `TextContent` of the folder.

    Raises:
        DataError: The file cannot be read, or has a different number of tokens.
    """
    path, dtype = folder / f"{split}.bin", np.dtype(content["dtype"])
    expected = content["num_tokens"][split] * dtype.itemsize
    try:
        size = path.stat().st_size
        if size != expected:
            raise ValueError(f"it has {size} bytes, but {content['num_tokens'][split]} tokens take {expected}")
        return np.memmap(path, dtype=dtype, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read the tokens in {path}: {error}. Copy or prepare the folder again.") from error


def read_ends(folder: Path, split: str, content: dict[str, Any]) -> np.ndarray:
    """Reads the position where each document of a split ends, int64, ascending.

    Args:
        folder: Folder of prepared text.
        split: Name of the split.
        content: The `TextContent` of the folder.

    Raises:
        DataError: The file cannot be read, or does not fit the tokens.
    """
    path = folder / ENDS.format(split)
    ends, size = read_array(path, np.int64, 1), content["num_tokens"][split]
    if not len(ends) or ends[0] < 1 or ends[-1] != size or (np.diff(ends) < 1).any():
        raise DataError(
            f"{path} does not hold the ends of documents with {size} tokens in total. Copy or prepare the folder again."
        )
    return ends


def read_array(path: Path, dtype: Any, dimensions: int) -> np.ndarray:
    """Reads an array of a given type into memory.

    Args:
        path: A file in numpy's format.
        dtype: The dtype that the array must have.
        dimensions: The number of dimensions that the array must have.

    Raises:
        DataError: The file cannot be read, or holds a different array.
    """
    try:
        array = np.load(path, mmap_mode="r")  # never reads past the end, whatever size the header claims
        if array.dtype != dtype or array.ndim != dimensions:
            raise ValueError(f"it holds {array.dtype} in {array.ndim} dimensions")
        return np.array(array)
    except (OSError, ValueError, EOFError, OverflowError, MemoryError, SyntaxError) as error:
        wanted = f"{np.dtype(dtype).name} in {dimensions} dimensions"
        raise DataError(f"cannot read {path} as {wanted}: {error}. Copy or prepare the folder again.") from error
