"""Files and text: the cache folder, atomic writes, checked reads, secrets, and untrusted text in messages and Markdown.

A kill or a power cut leaves a file either as it was or completely written.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import math
import os
import re
import reprlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    NoneType: "null",
}
_SECRETS = re.compile(
    r"(?<=://)(?:[^/?#\s'\"]+|[^/?#\s'\"@:]*:(?!\d+/)[^\s'\"]*)@"  # user:password of a URL, well-formed or not
    r"|(?<=[?&])((?:[\w-]*(?:token|secret|password|passwd|signature|credential|key|sig|auth))=)[^&#\s'\"]+"
    r"|\b(?:hf_|gh[opsu]_)[a-zA-Z0-9]{30,}|\bgithub_pat_\w{20,}",
    re.IGNORECASE,
)
_NUMBERS = re.compile(r"(?<=\[)\n(?:[-+\d.eE,\s]|null)+(?=\])")  # strings in JSON contain no line breaks
_LONGEST = 80  # characters of a value that a message repeats
_CLOSE = 0.65  # how alike a name must be to be suggested, as difflib measures it; gme and gem are 0.67
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = _LONGEST
_START = Path()
with contextlib.suppress(FileNotFoundError):  # the program's folder has been deleted
    _START = Path.cwd()


def shown(value: object) -> str:
    """Returns the repr of a value, shortened to 80 characters, for an error message."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python refuses to print integers of more than a few thousand digits
        text = "a huge integer"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def closest(given: str, allowed: Iterable[str]) -> str:
    """Returns the allowed name that is most like the given one, for a message, or an empty string if none is."""
    return next(iter(difflib.get_close_matches(given, list(allowed), n=1, cutoff=_CLOSE)), "")


def cache_folder() -> Path:
    """Returns the folder for files that take time to recompute: `$HF_GEM_CACHE`, or `~/.cache/hf_gem`.

    A relative path counts from the program's folder when it first used hf_gem. A later `os.chdir` does not change it.
    """
    return _START / Path(os.environ.get("HF_GEM_CACHE") or Path.home() / ".cache" / "hf_gem").expanduser()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces the content of a file in one step."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # unique, since machines may share a folder
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        flush(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    flush(path.parent)


def to_json(value: Any, indent: int | None = None) -> str:
    """Formats a value as JSON. NaN and infinity become null, and an indented list of numbers stays on one line."""
    text = json.dumps(_without_nan(value), indent=indent, allow_nan=False)
    return text if indent is None else _NUMBERS.sub(lambda found: " ".join(found[0].split()), text)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, kind: Any) -> Any:
    """Reads and checks a JSON file, which may come from anywhere.

    Args:
        path: Path of the file, in UTF-8.
        kind: Expected type of the content; see `check_type`.

    Raises:
        ValueError: The file cannot be read, is not JSON, or has another type. The message names the file and the field.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # no half characters, which no file can be written with
    except RecursionError:
        raise ValueError(f"{path} cannot be read: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    check_type(value, kind, f"{path}:")
    return value


def check_type(value: Any, kind: Any, where: str) -> None:
    """Checks that a value matches a type annotation.

    An int is accepted as a `float`. Extra keys of a `TypedDict` are ignored.

    Args:
        value: Value made of None, bool, int, float, str, list and dict, as JSON and YAML return it.
        kind: Annotation made of those types, `Any`, unions, `Literal` and `TypedDict`.
        where: Location of the value for the error message: the file, then the field.

    Raises:
        ValueError: The value does not match. The message gives the location, the expected type and the value.
    """
    origin, parts = get_origin(kind) or kind, get_args(kind)
    inside = f"{where} " if where.endswith(":") else where
    if is_typeddict(kind):
        _require(isinstance(value, dict), value, "a mapping", where)
        for name, part in get_type_hints(kind).items():
            place = inside + (name if inside.endswith(" ") else f".{name}")
            if name in value:
                check_type(value[name], part, place)
            elif name in kind.__required_keys__:
                raise ValueError(f"{place} is missing")
    elif origin in (Union, UnionType):
        if not any(_fits(value, part) for part in parts):
            for part in parts:
                if isinstance(value, (list, dict)) and isinstance(value, _container(part)):
                    check_type(value, part, where)  # its error points at the wrong part inside
            raise ValueError(_message(value, " or ".join(map(_name, parts)), where))
    elif origin in (list, dict):
        _require(isinstance(value, _container(kind)), value, _name(kind), where)
        for key, part in value.items() if origin is dict else enumerate(value):
            if origin is dict:
                _require(isinstance(key, str), key, "text as a key", where)
            check_type(part, (parts or (Any,))[-1], f"{inside}[{shown(key)}]")
    elif kind is not Any:
        _require(_fits(value, kind), value, _name(kind), where)


def _fits(value: Any, kind: Any) -> bool:
    """Returns whether `check_type` passes."""
    if kind in _KINDS:
        if isinstance(value, bool):  # bool is a subclass of int
            return kind is bool
        if isinstance(value, int) and abs(value) >= 2**1023:  # beyond floats, so that no mean of it could be taken
            return False
        return isinstance(value, (int, float) if kind is float else kind)
    if get_origin(kind) is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(kind))
    try:
        check_type(value, kind, "")
    except ValueError:
        return False
    return True


def _container(kind: Any) -> Any:
    return dict if is_typeddict(kind) else get_origin(kind) or kind


def _require(condition: bool, value: Any, allowed: str, where: str) -> None:
    if not condition:
        raise ValueError(_message(value, allowed, where))


def _message(value: Any, allowed: str, where: str) -> str:
    return f"{where} must be {allowed}, got {shown(value)}"


def _name(kind: Any) -> str:
    """Returns the name of a type in a message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return str(_KINDS.get(kind) or {list: "a list", dict: "a mapping"}[_container(kind)])


def is_inside(name: str) -> bool:
    """Returns whether a relative path read from a file stays inside its folder."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "\\" not in name and "\0" not in name and ":" not in name
    return plain and not PurePosixPath(name).is_absolute() and ".." not in parts


def redact(text: str) -> str:
    """Masks the secrets that people type into commands.

    It masks the user and password of a URL, URL parameters such as `token`, and access tokens of the Hub and GitHub.
    """
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***{'@' if found[0].endswith('@') else ''}", text)


def redacted(value: Any) -> Any:
    """Applies `redact` to every string in nested mappings and lists."""
    if isinstance(value, Mapping):
        return {key: redacted(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


def save_pretrained(thing: Any, folder: Path) -> None:
    """Calls `thing.save_pretrained` for tokenizers and processors, whose libraries raise a bare Exception.

    Raises:
        OSError: The call failed, with any exception.
    """
    try:
        thing.save_pretrained(folder)
    except Exception as error:
        raise OSError(str(error)) from error


def flush(path: Path) -> None:
    """Writes the content of a file, or the renames inside a folder, to disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return  # a system that cannot open a folder cannot flush it either
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise  # some network file systems cannot sync a folder
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table, without a trailing line break. Line breaks and bars inside a cell are escaped."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Puts a cell on one line and escapes its bars."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\|", re.sub(r"\s*[\r\n]\s*", " ", text))


def markdown_text(text: object) -> str:
    """Escapes untrusted text so that Markdown shows it literally, on one line, in a paragraph or a table cell."""
    line = re.sub(r"([\\`*\[\]<>&|~$])", r"\\\1", " ".join(str(text).split()))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", line)  # inside a word, an underscore has no meaning
    return re.sub(r"^(?:(?=[#+\-=](?:[#\-= ]|$))|(\d{1,9})(?=[.)](?: |$)))", r"\1\\", line)  # headings and lists


def markdown_code(text: object) -> str:
    """Formats untrusted text as inline code in Markdown."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def markdown_block(text: str, language: str = "") -> str:
    """Formats untrusted text as a Markdown code block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def replace_between(text: str, start: str, end: str, content: str) -> str:
    """Replaces the text between two markers, and keeps the markers.

    Raises:
        ValueError: The text does not contain both markers in this order.
    """
    head, found_start, rest = text.partition(start)
    _, found_end, tail = rest.partition(end)
    if not (found_start and found_end):
        raise ValueError(
            f"the text does not contain {start.strip()!r} followed by {end.strip()!r}. Both markers are required. Add "
            "them where the content belongs."
        )
    return head + start + content + end + tail
