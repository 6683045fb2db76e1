"""Where data come from, datasets of the Hub and local files, and the cache of what is made of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict, TypeVar

from filelock import FileLock, Timeout

from ...files import cache_folder, check_type, flush, is_inside, read_json
from ..config import option, require
from ..errors import DataError, Interrupted, needed_for
from ..signals import check, wait_for

T = TypeVar("T")
_META = "meta.json"
STOPPED = "stopped while the data were prepared; the same command starts again"
_LOOK_EVERY = 0.2  # seconds


@dataclass
class SourceConfig:
    """The dataset, its splits, and the cache."""

    # What they amount to, a hash of the data, is compared instead when a run is resumed.
    runtime: ClassVar[frozenset[str]] = frozenset(
        (
            "dataset",
            "dataset_config",
            "dataset_revision",
            "train_split",
            "validation_split",
            "validation_fraction",
            "test_split",
            "test_fraction",
            "cache_dir",
        )
    )
    builtin: ClassVar[str] = ""  # the name of the dataset that needs no files
    builders: ClassVar[dict[str, str]] = {}  # suffix of a local file, in lower case -> what `datasets` opens it with

    dataset: str = option("", "Hub dataset id, or local folder or file.")
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_revision: str | None = option(None, "Revision of a Hub dataset.")
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option(
        "validation", "Split to evaluate on; where there is none, part of train is held out."
    )
    validation_fraction: float = option(0.05, "Share of train held out when the dataset has no validation split.")
    test_split: str | None = option(
        None, "Split to evaluate on once, at the end, so that what was chosen by validation is judged on other samples."
    )
    test_fraction: float = option(0.0, "Share of train held out for that when there is no test split; 0: no test.")
    cache_dir: str | None = option(None, "Cache of prepared data; by default $HF_GEM_CACHE or ~/.cache/hf_gem.")

    @property
    def on_hub(self) -> bool:
        """Whether the dataset is one of the Hub."""
        return self.dataset != self.builtin and not Path(self.dataset).exists()

    def validate(self) -> None:
        """Raises ValueError, naming the field, when a value makes no sense."""
        require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        rest = 1 - self.validation_fraction
        require(0 <= self.test_fraction < rest, "test_fraction", self.test_fraction, f"in [0, {rest:g})")

    def held_out(self, splits: Container[str]) -> dict[str, float]:
        """What is held out of the training split: validation, test or both -> the share of it.

        Args:
            splits: Those that the dataset has.

        Raises:
            DataError: it has no test split, and that was asked for.
        """
        if self.test_split and not self.test_fraction and self.test_split not in splits:
            raise DataError(
                f"{self.dataset!r} has no split {self.test_split!r} for --test_split; name another one, or hold out a "
                "--test_fraction of the training data"
            )
        shares = {} if self.validation_split in splits else {"validation": self.validation_fraction}
        if self.test_fraction and self.test_split not in splits:
            shares["test"] = self.test_fraction
        return shares

    def own_splits(self, held_out: Container[str]) -> dict[str, str]:
        """Validation and test, so far as they are splits of the dataset -> the names of these.

        Args:
            held_out: What is not, of `held_out`.
        """
        own = {"validation": self.validation_split, "test": self.test_split}
        return {part: split for part, split in own.items() if split and part not in held_out}


def load_splits(config: SourceConfig, streaming: bool = False) -> dict[str, Any]:
    """The splits of a dataset that is not the built-in one, by name.

    Raises:
        ConfigError: the package datasets is not installed.
        DataError: it cannot be read, or has no such split to train on.
    """
    with needed_for(f"reading --dataset {config.dataset!r}"):
        from datasets import load_dataset

    path = Path(config.dataset)
    try:
        if path.exists():
            arguments = _local_arguments(path, config.builders)
        else:
            arguments = {"path": config.dataset, "name": config.dataset_config, "revision": config.dataset_revision}
        loaded = wait_for(lambda: load_dataset(**arguments, streaming=streaming), STOPPED)  # it may download for hours
    except (DataError, Interrupted):
        raise
    except Exception as error:  # datasets raises whatever its readers do
        raise DataError(
            f"the dataset {config.dataset!r} cannot be read: {type(error).__name__}: {error}. --dataset takes a "
            f"Hub dataset id, a local folder or file ({', '.join(config.builders)}), or {config.builtin!r}"
        ) from error
    if config.train_split not in loaded:
        raise DataError(
            f"{config.dataset!r} has no split {config.train_split!r}; --train_split can be {' or '.join(loaded)}"
        )
    return dict(loaded)


def _local_arguments(path: Path, builders: dict[str, str]) -> dict[str, Any]:
    """How `load_dataset` opens a local file or folder."""
    if path.is_file():
        if path.suffix.lower() not in builders:
            raise DataError(f"{path} has suffix {path.suffix!r}; a file can be one of {', '.join(builders)}")
        files = {"train": [path]}
    else:
        files = {}
        for file in checked(sorted(path.rglob("*"))):
            if file.suffix.lower() in builders and file.stem.lower() not in ("readme", "license"):
                files.setdefault(_split_of(file.relative_to(path)), []).append(file)
    kinds = {builders[file.suffix.lower()] for group in files.values() for file in group}
    if len(kinds) != 1:
        raise DataError(
            f"the folder {path} must hold files of one kind out of {', '.join(builders)}; found "
            f"{', '.join(sorted(kinds)) or 'none'}"
        )
    kind = kinds.pop()
    if kind == "imagefolder" and path.is_dir():
        return {"path": kind, "data_dir": str(path)}  # which takes labels from the names of folders
    return {
        "path": kind,
        "data_files": {split: [str(file) for file in group] for split, group in files.items()},
        **({"sample_by": "document"} if kind == "text" else {}),  # a text file is one document, not one a line
    }


def _split_of(file: Path) -> str:
    """The split a file belongs to by the words of its path, as on the Hub; train, where none says otherwise."""
    words = set(re.split(r"[^a-z]+", file.as_posix().lower()))
    for split, names in (("validation", {"validation", "valid", "val", "dev"}), ("test", {"test", "testing"})):
        if words & names:
            return split
    return "train"


def checked(items: Iterable[T]) -> Iterator[T]:
    """The items; in front of each it looks whether a signal has arrived.

    Raises:
        Interrupted: one has.
    """
    for item in items:
        check(STOPPED)
        yield item


def fingerprint(name: str) -> list[Any] | None:
    """The state of a local file, or of all files in a local folder; None where there is neither."""
    path = Path(name)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in checked(path.rglob("*")) if p.is_file())
    return [file_state(file) for file in checked(files)]


def file_state(path: Path) -> list[Any]:
    """A file's place, size and time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def source_state(config: SourceConfig) -> list[Any]:
    """What identifies a dataset that is not the built-in one: the state of its files, or its revision on the Hub."""
    where = fingerprint(config.dataset) or [config.dataset, config.dataset_config, config.dataset_revision]
    fractions = [config.validation_fraction, config.test_fraction]
    return [where, config.train_split, config.validation_split, config.test_split, fractions]


def cached(
    config: SourceConfig, kind: str, key: Any, content: Any, build: Callable[[Path], dict[str, Any]]
) -> tuple[Path, Any]:
    """The folder of prepared data, built at the first time. Processes that ask at once wait for the first.

    Where the dataset is itself a folder that was built here, perhaps on another machine, it is taken as it is. Neither
    that nor the cache has to be of this origin: what does not have the right types and sizes is not taken.

    Args:
        config: Names the cache.
        kind: Of data; a folder of the cache.
        key: All that decides the content, as JSON.
        content: The type of what `build` returns.
        build: Fills a folder, and returns what is to be known of it, as JSON.

    Returns:
        The folder and what `build` returned.

    Raises:
        DataError: the cache cannot be written, or the folder that is the dataset is not complete.
    """
    if is_prepared(config):
        given = Path(config.dataset)
        try:
            return given, _whole(given, content)
        except ValueError as error:
            raise DataError(f"{error}; copy the folder again") from error
    root = Path(config.cache_dir or cache_folder()) / kind
    folder = root / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(Path(f"{folder}.lock")):
            with contextlib.suppress(ValueError):
                return folder, _whole(folder, content)
            _build(folder, build)
            return folder, _whole(folder, content)
    except OSError as error:
        raise DataError(f"what is made of {config.dataset!r} cannot be cached in {root}: {error}") from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock, for which it waits with an eye on signals."""
    lock = FileLock(path)
    while True:
        check(STOPPED)
        try:
            lock.acquire(timeout=_LOOK_EVERY)
            break
        except Timeout:
            continue
    try:
        yield
    finally:
        lock.release()


def is_prepared(config: SourceConfig) -> bool:
    """Whether the dataset is a folder that `cached` has built, or one that looks like it."""
    try:
        found: dict[str, Any] = read_json(Path(config.dataset, _META), dict[str, Any])
    except ValueError:
        return False  # it is of another origin
    return found.keys() == {"content", "bytes"}


class _Meta(TypedDict):
    content: dict[str, Any]
    bytes: dict[str, int]


def _whole(folder: Path, content: Any) -> dict[str, Any]:
    """What `_build` wrote of a folder.

    Raises:
        ValueError: it is not what was built, or files are missing or cut short.
    """
    found: _Meta = read_json(folder / _META, _Meta)
    check_type(found["content"], content, f"{folder / _META}: content")
    for name, size in found["bytes"].items():
        try:
            sound = is_inside(name) and (folder / name).stat().st_size == size
        except OSError:
            sound = False
        if not sound:
            raise ValueError(f"of the prepared data in {folder} {name!r} is missing or cut short")
    return found["content"]


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    work = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed
    work.mkdir()
    try:
        content = build(work)
        sizes = {path.relative_to(work).as_posix(): path.stat().st_size for path in work.rglob("*") if path.is_file()}
        (work / _META).write_text(json.dumps({"content": content, "bytes": sizes}, indent=2))
        for path in work.iterdir():
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
