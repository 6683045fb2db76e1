"""Files: the cache folder, writing that a kill or a power cut cannot leave half done, and parts of Markdown files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_NUMBERS = re.compile(r"(?<=\[)\n(?:[-+\d.eE,\s]|null)+(?=\])")  # no text has a line break in JSON


def cache_folder() -> Path:
    """Where things are kept that take time to make again: `$HF_GEM_CACHE`, or `~/.cache/hf_gem`."""
    return Path(os.environ.get("HF_GEM_CACHE") or Path.home() / ".cache" / "hf_gem").expanduser()


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's content in one step."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # its own: several machines may share a folder
    partial.write_text(text, encoding="utf-8")
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON with null for NaN and infinity, which it lacks; indented, a list of numbers still takes one line."""
    text = json.dumps(_without_nan(value), indent=indent, allow_nan=False)
    return text if indent is None else _NUMBERS.sub(lambda found: " ".join(found[0].split()), text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_pretrained(thing: Any, folder: Path) -> None:
    """Calls `thing.save_pretrained`, for tokenizers and processors, whose libraries raise a bare Exception.

    Raises:
        OSError: it failed, whatever it raised.
    """
    try:
        thing.save_pretrained(folder)
    except Exception as error:
        raise OSError(str(error)) from error


def flush(path: Path) -> None:
    """Forces a file's content, or the renames inside a folder, to the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # systems that cannot open a folder cannot flush it either
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise  # some network file systems refuse it, for folders
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, without a line break at its end."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_between(text: str, start: str, end: str, content: str) -> str:
    """`text` with `content` in place of what stands between two markers, which stay.

    Raises:
        ValueError: the markers are not there in this order.
    """
    head, found_start, rest = text.partition(start)
    _, found_end, tail = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(f"the text has no {start.strip()!r} followed by {end.strip()!r}, between which to write")
    return head + start + content + end + tail
