"""Reads datasets from the Hub or local files, and caches the data prepared from them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict, TypeVar

from filelock import FileLock, Timeout

from ...files import cache_folder, check_type, flush, is_inside, read_json, shown
from ..config import option, require
from ..errors import DataError, Interrupted, needed_for, reason
from ..signals import LOOK_EVERY, check, wait_for

T = TypeVar("T")
_META = "meta.json"
STOPPED = "stopped while preparing the data; run the same command again to start over"
_SPLITS = {  # the word that names a split of a local folder, in lower case -> the split
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"[-_. ]?\d+(?:-of-\d+)?(?:-[0-9a-f]{16})?$")  # as in train-00000-of-00002, perhaps with a hash
_HIDDEN = re.compile(r"/(?:\.|__[^/]*/)")  # what `datasets` skips too


@dataclass
class SourceConfig:
    """The dataset, its splits, and the cache."""

    # When a run is resumed, the hash of the data is compared instead of these.
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
    builtin: ClassVar[str] = ""  # name of the dataset that needs no files
    builders: ClassVar[dict[str, str]] = {}  # suffix of a local file, in lower case -> the builder of `datasets`

    dataset: str = option("", "Hub dataset id, or local folder or file.")
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_revision: str | None = option(None, "Revision of a Hub dataset.")
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option(
        "validation", "Split to evaluate on; if there is none, part of the training split is held out."
    )
    validation_fraction: float = option(
        0.05, "Share of the training split to hold out if the dataset has no validation split."
    )
    test_split: str | None = option(
        None, "Split to evaluate on once, at the end, so that choices made by validation are judged on other samples."
    )
    test_fraction: float = option(
        0.0, "Share of the training split to hold out as a test if there is no test split; 0: no test."
    )
    cache_dir: str | None = option(None, "Cache of prepared data; by default $HF_GEM_CACHE or ~/.cache/hf_gem.")

    @property
    def on_hub(self) -> bool:
        """Whether the dataset is on the Hub."""
        return self.dataset != self.builtin and not Path(self.dataset).exists()

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        require(0 < self.validation_fraction < 1, "validation_fraction", self.validation_fraction, "between 0 and 1")
        rest = 1 - self.validation_fraction
        require(0 <= self.test_fraction < rest, "test_fraction", self.test_fraction, f"in [0, {rest:g})")

    def held_out(self, splits: Container[str]) -> dict[str, float]:
        """Decides what to hold out of the training split: validation, test or both -> its share.

        Args:
            splits: Splits of the dataset.

        Raises:
            DataError: A test split was requested, but the dataset has none.
        """
        if self.test_split and not self.test_fraction and self.test_split not in splits:
            raise DataError(
                f"{shown(self.dataset)} has no split {shown(self.test_split)}. --test_split must be one of its splits. "
                "Name one, or hold out a --test_fraction of the training data."
            )
        shares = {} if self.validation_split in splits else {"validation": self.validation_fraction}
        if self.test_fraction and self.test_split not in splits:
            shares["test"] = self.test_fraction
        return shares

    def own_splits(self, held_out: Container[str]) -> dict[str, str]:
        """Returns validation and test -> the name of the dataset's split, for those that are not held out.

        Args:
            held_out: The parts that are held out, from `held_out`.
        """
        own = {"validation": self.validation_split, "test": self.test_split}
        return {part: split for part, split in own.items() if split and part not in held_out}


def load_splits(config: SourceConfig, streaming: bool = False) -> dict[str, Any]:
    """Loads the splits of a dataset other than the built-in one, by name.

    Raises:
        ConfigError: The package datasets is not installed.
        DataError: The dataset cannot be read, or lacks the training split.
    """
    with needed_for(f"reading --dataset {shown(config.dataset)}"):
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError

    path = Path(config.dataset)
    try:
        if path.exists():
            arguments = _local_arguments(path, config.builders)
        else:
            arguments = {"path": config.dataset, "name": config.dataset_config, "revision": config.dataset_revision}
        loaded = wait_for(lambda: load_dataset(**arguments, streaming=streaming), STOPPED)  # may download for hours
    except (DataError, Interrupted):
        raise
    except Exception as error:  # each reader of datasets raises its own
        hidden = error.__cause__ if type(error) is DatasetGenerationError else None  # this type itself says nothing
        fix = "Fix the data."
        if not path.exists():
            kinds = ", ".join(config.builders)
            fix = f"--dataset can be a Hub dataset id, a local folder or file ({kinds}), or {config.builtin!r}. "
            fix += "Check the name."
        raise _unreadable(config, hidden if isinstance(hidden, Exception) else error, fix) from error
    if config.train_split not in loaded:
        raise DataError(
            f"{shown(config.dataset)} has no split {shown(config.train_split)}. Its splits are {', '.join(loaded)}. "
            "Name one with --train_split."
        )
    return dict(loaded)


def read_column(config: SourceConfig, table: Any, column: str) -> Iterator[Any]:
    """Yields the values of a column of a split.

    Raises:
        DataError: A row cannot be read.
    """
    try:
        for row in table.select_columns(column):
            yield row[column]
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(config, error, "Fix the data.") from error


def _unreadable(config: SourceConfig, error: Exception, fix: str) -> DataError:
    """Makes the error for a dataset that `datasets` could not read. It names the file at fault, if that is known."""
    path = Path(config.dataset)
    if path.is_dir() and (file := _file_at_fault(path, error)):
        return DataError(
            f"cannot read {file}: {reason(error)}. Each file must be complete, in UTF-8, and have the same columns as "
            "the first. Repair the file, or move it away."
        )
    return DataError(f"cannot read the dataset {shown(config.dataset)}: {reason(error)}. {fix}")


def _file_at_fault(folder: Path, error: Exception) -> Path | None:
    """Finds the file in a folder that `datasets` could not read.

    Few of its errors name the file, but each of its readers has the path in a variable when it fails.
    """
    absolute = os.path.abspath  # without .., and it follows no links
    files = {absolute(file): file for file in _visible(folder)}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, str) and absolute(value) in files:
                return files[absolute(value)]
    if isinstance(error, UnicodeDecodeError):  # JSON is only decoded later, when its rows are read
        json_files = (file for file in files.values() if file.suffix.lower() in (".json", ".jsonl"))
        return next((file for file in json_files if not _is_utf8(file)), None)
    return None


def _is_utf8(file: Path) -> bool:
    try:
        with file.open(encoding="utf-8") as lines:
            return all(True for _ in lines)
    except UnicodeDecodeError:
        return False


def _local_arguments(path: Path, builders: dict[str, str]) -> dict[str, Any]:
    """Returns the arguments with which `load_dataset` opens a local file or folder."""
    if path.is_file():
        if path.suffix.lower() not in builders:
            raise DataError(
                f"the file {path} has the suffix {shown(path.suffix)}. It can be {', '.join(builders)}. Convert the "
                "file."
            )
        return _file_arguments(builders[path.suffix.lower()], {"train": [path]})
    visible = _visible(path)
    files = [
        file for file in visible if file.suffix.lower() in builders and file.stem.lower() not in ("readme", "license")
    ]
    kinds = {builders[file.suffix.lower()] for file in files}
    if len(kinds) != 1:
        raise DataError(
            f"the folder {path} holds these kinds of files: {', '.join(sorted(kinds)) or 'none'}. It must hold one "
            f"kind of {', '.join(builders)}. Name another folder, or move the other files away."
        )
    kind = kinds.pop()
    if kind == "imagefolder":
        described = {file.parent for file in visible if file.name in ("metadata.csv", "metadata.jsonl")}
        return {"path": kind, "data_files": _image_patterns(path, files, described), "drop_labels": False}
    groups: dict[str, list[Path]] = {}
    top = _top(path, files)
    for file in files:
        groups.setdefault(_split_of(file.relative_to(top)), []).append(file)
    return _file_arguments(kind, groups)


def _visible(folder: Path) -> list[Path]:
    """Returns the paths in a folder, except those that `datasets` skips too."""
    found = checked(sorted(folder.rglob("*")))
    return [path for path in found if not _HIDDEN.search(f"/{path.relative_to(folder).as_posix()}")]


def _file_arguments(kind: str, groups: dict[str, list[Path]]) -> dict[str, Any]:
    """Returns the arguments of `load_dataset` for the files of each split."""
    return {
        "path": kind,
        "data_files": {split: [glob.escape(str(file)) for file in group] for split, group in groups.items()},
        **({"sample_by": "document"} if kind == "text" else {}),  # a text file is one document, not one per line
    }


def _top(path: Path, files: list[Path]) -> Path:
    """Returns the folder whose subfolders may be splits. A folder that holds only one other is passed over."""
    common = Path(os.path.commonpath([file.parent.parent for file in files]))
    if path in common.parents:
        for name in common.relative_to(path).parts:
            if name.lower() in _SPLITS:
                break
            path /= name
    return path


def _split_of(file: Path) -> str:
    """Finds the split of a file: its first folder or its name is the word for one, or else it is train.

    Words inside longer names, such as "the test of time.txt", have other meanings.
    """
    name = _SHARD.sub("", file.stem.lower())
    return _SPLITS.get(file.parts[0].lower()) or _SPLITS.get(name, "train")


def _image_patterns(path: Path, files: list[Path], described: set[Path]) -> dict[str, list[str]]:
    """Returns the glob patterns of each split of a folder of images.

    Subfolders are splits if all are named so and hold folders of classes. Otherwise they are classes themselves.

    Args:
        path: The folder.
        files: Its images.
        described: Folders in which a metadata file lists the images. These need no folders of classes.

    Raises:
        DataError: An image is not in the folder of a class.
    """
    top = path if described else _top(path, files)
    names = {file.relative_to(top).parts[0] for file in files}
    direct = any(file.parent.parent == top and file.parent not in described for file in files)
    are_splits = not direct and all(name.lower() in _SPLITS for name in names)
    roots = [top / name for name in sorted(names)] if are_splits else [top]
    for file in files:
        if not described and file.parent.parent not in roots:
            raise DataError(
                f"the image {shown(str(file))} is not directly in the folder of a class. {path} must hold one folder "
                "of images per class, or folders train, validation and test that hold those. Move the image, or name "
                "another folder."
            )
    patterns: dict[str, list[str]] = {}
    for root in roots:
        split = _SPLITS[root.name.lower()] if are_splits else "train"
        patterns.setdefault(split, []).append(f"{glob.escape(str(root))}/**")
    return patterns


def checked(items: Iterable[T]) -> Iterator[T]:
    """Yields the items, and checks for a signal before each.

    Raises:
        Interrupted: A signal arrived.
    """
    for item in items:
        check(STOPPED)
        yield item


def fingerprint(name: str) -> list[Any] | None:
    """Returns the state of a local file, or of all files in a local folder; None if the path does not exist."""
    path = Path(name)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(p for p in checked(path.rglob("*")) if p.is_file())
    return [file_state(file) for file in checked(files)]


def file_state(path: Path) -> list[Any]:
    """Returns path, size and modification time of a file."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def source_state(config: SourceConfig) -> list[Any]:
    """Identifies a dataset other than the built-in one, by the state of its files or its revision on the Hub."""
    where = fingerprint(config.dataset) or [config.dataset, config.dataset_config, config.dataset_revision]
    fractions = [config.validation_fraction, config.test_fraction]
    return [where, config.train_split, config.validation_split, config.test_split, fractions]


def cached(
    config: SourceConfig, kind: str, key: Any, content: Any, build: Callable[[Path], dict[str, Any]]
) -> tuple[Path, Any]:
    """Returns the folder of prepared data, building it the first time. Other processes wait for the one that builds.

    If the dataset is itself such a folder, perhaps built on another machine, it is used as it is. Neither that folder
    nor the cache is trusted: data with wrong types or sizes are rejected.

    Args:
        config: The config with the dataset and the cache.
        kind: Kind of data, which names a folder of the cache.
        key: Everything that determines the content, as JSON.
        content: The type of what `build` returns.
        build: Fills a folder and returns facts about it, as JSON.

    Returns:
        The folder, and what `build` returned.

    Raises:
        DataError: The cache cannot be written, or the dataset is an incomplete folder.
    """
    if is_prepared(config):
        given = Path(config.dataset)
        try:
            return given, _whole(given, content)
        except ValueError as error:
            raise DataError(f"{error}. Copy the folder again.") from error
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
        raise DataError(
            f"cannot cache the data of {shown(config.dataset)} in {root}: {error}. Free some space, or name another "
            "--cache_dir."
        ) from error


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits for a lock and holds it, checking for signals while it waits."""
    lock = FileLock(path)
    while True:
        check(STOPPED)
        try:
            lock.acquire(timeout=LOOK_EVERY)
            break
        except Timeout:
            continue
    try:
        yield
    finally:
        lock.release()


def is_prepared(config: SourceConfig) -> bool:
    """Returns whether the dataset is a folder that `cached` built, or looks like one."""
    try:
        found: dict[str, Any] = read_json(Path(config.dataset, _META), dict[str, Any])
    except ValueError:
        return False  # something else made it
    return found.keys() == {"content", "bytes"}


class _Meta(TypedDict):
    content: dict[str, Any]
    bytes: dict[str, int]


def _whole(folder: Path, content: Any) -> dict[str, Any]:
    """Reads the facts that `_build` wrote about a folder.

    Raises:
        ValueError: They are invalid, or files are missing or cut short.
    """
    found: _Meta = read_json(folder / _META, _Meta)
    check_type(found["content"], content, f"{folder / _META}: content")
    for name, size in found["bytes"].items():
        try:
            sound = is_inside(name) and (folder / name).stat().st_size == size
        except OSError:
            sound = False
        if not sound:
            raise ValueError(f"the prepared data in {folder} are incomplete: {shown(name)} is missing or cut short")
    return found["content"]


def _build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> None:
    work = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
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
