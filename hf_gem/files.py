"""Files: the cache folder, writing that a kill or a power cut cannot leave half done, reading what others may have
written, and text from elsewhere as Markdown shows it.
"""

from __future__ import annotations

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


def read_json(path: Path, kind: Any) -> Any:
    """What a JSON file holds, which may be of any origin.

    Args:
        path: The file, in UTF-8.
        kind: What it has to hold; see `check_type`.

    Raises:
        ValueError: it cannot be read, is no JSON, or holds something else. The message names file and field.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # no half characters, which no file can be written with
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be read") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    check_type(value, kind, f"{path}:")
    return value


def read_yaml(text: str) -> Any:
    """What a text in YAML holds, which may be of any origin.

    Raises:
        ValueError: it cannot be read. PyYAML raises all kinds of errors where a number or a date is none.
    """
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(reason if len(reason) <= 300 else f"{reason[:200]} ... {reason[-90:]}") from error


def check_type(value: Any, kind: Any, where: str) -> None:
    """Checks that a value has the type of an annotation.

    A `float` may be whole. A `TypedDict` may have further keys, which are not looked at.

    Args:
        value: Made of None, bool, int, float, str, list and dict, as JSON and YAML give it.
        kind: An annotation made of those, `Any`, unions, `Literal` and `TypedDict`.
        where: The place of the value, for the message: the file, and then the field.

    Raises:
        ValueError: it has not. The message names place, kind and value.
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
                    check_type(value, part, where)  # which says what is wrong inside
            raise ValueError(_message(value, " or ".join(map(_name, parts)), where))
    elif origin in (list, dict):
        _require(isinstance(value, _container(kind)), value, _name(kind), where)
        for key, part in value.items() if origin is dict else enumerate(value):
            if origin is dict:
                _require(isinstance(key, str), key, "text as a key", where)
            check_type(part, (parts or (Any,))[-1], f"{inside}[{reprlib.repr(key)}]")
    elif kind is not Any:
        _require(_fits(value, kind), value, _name(kind), where)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `check_type` passes."""
    if kind in _KINDS:
        if isinstance(value, bool):  # which Python takes for a number
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
    return f"{where} must be {allowed}, got {reprlib.repr(value)}"


def _name(kind: Any) -> str:
    """What a kind is called in a message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return str(_KINDS.get(kind) or {list: "a list", dict: "a mapping"}[_container(kind)])


def is_inside(name: str) -> bool:
    """Whether a name from a file, with slashes, stays in the folder that it is taken to be in."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and "\\" not in name and "\0" not in name and ":" not in name
    return plain and not PurePosixPath(name).is_absolute() and ".." not in parts


def redact(text: str) -> str:
    """A text without the secrets that people type into commands.

    These are user and password in a URL, values of URL parameters such as `token`, and tokens of the Hub and of GitHub.
    """
    return _SECRETS.sub(lambda found: f"{found[1] or ''}***{'@' if found[0].endswith('@') else ''}", text)


def redacted(value: Any) -> Any:
    """A value made of mappings, lists and texts, with each text as in `redact`."""
    if isinstance(value, Mapping):
        return {key: redacted(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value


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
    """A table in Markdown, without a line break at its end. No cell breaks out of its place."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """A cell in one line, with a backslash before each bar that has none."""
    return re.sub(r"(?<!\\)((?:\\\\)*)\|", r"\1\|", re.sub(r"\s*[\r\n]\s*", " ", text))


def markdown_text(text: object) -> str:
    """A text from elsewhere in one line, which Markdown shows as it is: in a paragraph or in a cell of a table."""
    line = re.sub(r"([\\`*\[\]<>&|~$])", r"\\\1", " ".join(str(text).split()))
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", line)  # within a word it has no meaning
    return re.sub(r"^(?:(?=[#+\-=](?:[#\-= ]|$))|(\d{1,9})(?=[.)](?: |$)))", r"\1\\", line)  # of headings and lists


def markdown_code(text: object) -> str:
    """A text from elsewhere as code within a line of Markdown."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def markdown_block(text: str, language: str = "") -> str:
    """A text from elsewhere as a block of code in Markdown."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


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
