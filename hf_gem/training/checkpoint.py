"""Checkpoints that are complete or absent.

A checkpoint is written to a hidden folder beside its place and renamed into it; then a file `COMPLETE`, which lists
every file with its size and SHA-256, is renamed into the folder. Whatever lacks it, or does not match it, is not a
checkpoint. Older ones are deleted only after a newer one is complete. A file `PARTIAL` marks what is half written or
half deleted: without one of these two marks, nothing is deleted.

A checkpoint may come from anywhere: nothing in it is run. Weights are safetensors, and `torch.load` reads all else with
`weights_only=True`. The SHA-256 finds damage, and says nothing of who has written it.
"""

from __future__ import annotations

import contextlib
import json
import re
import reprlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..files import flush, is_inside, read_json, redacted, sha256, write_atomically
from .errors import CheckpointError
from .record import check_saved
from .sharded import is_sharded, load_sharded

COMPLETE = "COMPLETE"
_PARTIAL = "PARTIAL"
_STATE = "state.json"
_AVERAGED = "averaged.safetensors"
_NAME, _ASIDE = re.compile(r"step_(\d{8,})"), re.compile(r"set_aside_step_\d{8,}(_\d+)?")
# What loading may look for, hidden copies that macOS makes apart; all of these files have to be listed in COMPLETE.
_READ = re.compile(r"(?!\._).*\.(?:safetensors|bin|pt|pkl|json|distcp|metadata)")


class _File(TypedDict):
    bytes: int
    sha256: str


class _State(TypedDict):
    step: int
    identity: dict[str, Any]
    state: Any


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie, as `step_00000100` and so on.
        keep: Number of complete checkpoints to keep.
        identity: What has to be equal for a checkpoint to be continued, and on all processes of a run: config fields
            and the hash of the data.
        averaged: A module with averaged weights, the same in all processes; None without.
        check: Given what was saved beside weights and optimizer, and its place, raises ValueError where it is wrong.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        identity: Mapping[str, Any],
        averaged: nn.Module | None = None,
        check: Callable[[Any, str], None] = check_saved,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = json.loads(json.dumps(redacted(identity)))  # as it will read back: tuples become lists
        self.check = check
        self.averaged = averaged

    def complete(self) -> list[Path]:
        """Complete checkpoints, newest first. Their content is not verified yet."""
        found = [path.parent for path in self.folder.glob(f"step_*/{COMPLETE}") if _NAME.fullmatch(path.parent.name)]
        return sorted(found, key=_step_of, reverse=True)

    def save(self, accelerator: Accelerator, step: int, state: Any = None) -> Path:
        """Saves model, optimizer, scaler and random states after `step` steps; all processes call it.

        Args:
            accelerator: Holds the prepared model and optimizer.
            step: Number of steps done.
            state: What else belongs to it, as JSON.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full. What was complete stays.
        """
        final = self.folder / f"step_{step:08d}"
        work = self.folder / f".{final.name}.partial"
        try:
            if accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
                if work.exists():
                    self._set_aside(work)
                work.mkdir()
                (work / _PARTIAL).touch()
            accelerator.wait_for_everyone()
            accelerator.save_state(str(work))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                if self.averaged is not None:
                    save_model(self.averaged, str(work / _AVERAGED))
                content = {"step": step, "identity": self.identity, "state": state}
                (work / _STATE).write_text(json.dumps(content, indent=2))
                self._publish(work, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if (work / _PARTIAL).exists():
                shutil.rmtree(work, ignore_errors=True)
            newest = next(iter(self.complete()), None)
            free = shutil.disk_usage(self.folder if self.folder.exists() else Path()).free
            raise CheckpointError(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {error} "
                f"({free / 1e9:.2f} GB free). {f'{newest} is complete' if newest else 'There is no older one'}; "
                "make room and start the same command again"
            ) from error
        accelerator.wait_for_everyone()
        return final

    def _publish(self, work: Path, final: Path) -> None:
        manifest = {}
        for path in sorted(p for p in work.rglob("*") if p.is_file() and p != work / _PARTIAL):
            flush(path)
            manifest[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if final.exists():
            self._set_aside(final)
        work.rename(final)
        write_atomically(final / COMPLETE, json.dumps(manifest, indent=2))
        (final / _PARTIAL).unlink()
        flush(self.folder)
        for old in self.complete()[self.keep :]:
            _remove(old)

    def _sweep(self) -> None:
        """Removes what a kill left half-written or half-deleted."""
        for path in {*self.folder.glob(f"step_*/{_PARTIAL}"), *self.folder.glob(f".step_*.partial/{_PARTIAL}")}:
            if not (path.parent / COMPLETE).exists():
                _remove(path.parent)

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"set_aside_{path.name}")
        number = 2
        while aside.exists():
            aside, number = path.with_name(f"set_aside_{path.name}_{number}"), number + 1
        path.rename(aside)

    def restore(self, accelerator: Accelerator, resume: str) -> tuple[int, Any]:
        """Loads a checkpoint into what the accelerator has prepared; all processes call it.

        The main process chooses. Checkpoints that are damaged, or lie after the one that is continued, are renamed to
        `set_aside_…`: they are no part of this run any more, and nothing deletes them.

        Args:
            accelerator: Holds the prepared model and optimizer.
            resume: `auto` for the newest good one, `never` to insist on a new run, or the path of one.

        Returns:
            The number of steps done and the state saved with it; 0 and None where there is nothing to continue.

        Raises:
            CheckpointError: all checkpoints, or the one named, are damaged or belong to another run; or the processes
                do not agree on data or configuration.
        """
        message: list[Any] = [None, None, self.identity]
        if accelerator.is_main_process:
            try:
                message[0] = self._choose(resume)
            except CheckpointError as error:
                message[1] = str(error)
        broadcast_object_list(message)
        path, refusal, identity = message
        if refusal:
            raise CheckpointError(refusal)
        self._compare(identity, self.identity, "process 0", f"process {accelerator.process_index}")
        if path is None:
            return 0, None
        try:
            content = self._state(path)
            self._load(accelerator, path)
        except OSError as missing:
            raise CheckpointError(
                f"process {accelerator.process_index} cannot read {path}, which process 0 continues: {missing}; "
                "--output_dir has to be a folder that all machines see"
            ) from missing
        except Exception as error:  # of torch, accelerate and safetensors, on files that are none of theirs
            raise CheckpointError(
                f"the checkpoint {path} cannot be loaded: {type(error).__name__}: {error}. It is not one of this run, "
                "or somebody has changed it; name another one with --resume, or another --output_dir"
            ) from error
        return content["step"], content["state"]

    def _load(self, accelerator: Accelerator, path: Path) -> None:
        if is_sharded(accelerator):
            load_sharded(accelerator, path)
        else:
            accelerator.load_state(str(path))
        if self.averaged is not None:
            load_model(self.averaged, path / _AVERAGED)

    def _state(self, path: Path) -> _State:
        """What is saved beside weights and optimizer.

        Raises:
            ValueError: it is not what a run saves.
        """
        content: _State = read_json(path / _STATE, _State)
        self.check(content["state"], f"{path / _STATE}: state")
        if content["step"] < 1:
            raise ValueError(f"{path / _STATE}: step must be at least 1, got {content['step']}")
        if _NAME.fullmatch(path.name) and _step_of(path) != content["step"]:
            raise ValueError(f"{path / _STATE}: step must be that of {path.name}, got {content['step']}")
        return content

    def _choose(self, resume: str) -> Path | None:
        """The verified checkpoint to continue, or None for a new run."""
        found = self.complete()
        if resume == "never":
            if found:
                raise CheckpointError(
                    f"{self.folder} holds {found[0].name} and --resume is never; choose another --output_dir, delete "
                    "the folder, or go on with --resume auto"
                )
            return None
        named = resume != "auto"
        outside = Path(resume).is_dir() and Path(resume).absolute().parent != self.folder.absolute()
        if named and outside and found:
            # A run that was brought here, and has gone on here since; the path inside its own folder means going back.
            mine, theirs = (self._run_id(path) for path in (found[0], Path(resume)))
            if mine != theirs:
                raise CheckpointError(
                    f"{self.folder} holds another run than {resume}; choose another --output_dir, or --resume auto"
                )
            named = False
        damages: dict[Path, str | None] = {}
        for path in [Path(resume)] if named else found:
            damages[path] = self._damage(path)
            if not damages[path]:
                theirs = self._state(path)["identity"]
                self._compare(theirs, self.identity, str(path), "this command")
                for other in found:
                    if other.name > path.name:
                        self._set_aside(other)
                return path
            if not named:
                warnings.warn(f"passing over the damaged checkpoint {path}: {damages[path]}", stacklevel=2)
        if named:
            raise CheckpointError(f"the checkpoint {resume} cannot be continued: {damages[Path(resume)]}")
        if damages:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged: "
                + "; ".join(f"{path.name}: {damage}" for path, damage in damages.items())
                + ". Restore one, or delete the folder to start anew"
            )
        return None

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any], whose: str, who: str) -> None:
        changed = [
            f"{name}: {_short(theirs.get(name))} in {whose}, {_short(ours.get(name))} in {who}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"these are different runs ({'; '.join(changed)}); choose another --output_dir, or the same values"
            )

    def _run_id(self, path: Path) -> Any:
        try:
            state = self._state(path)["state"]
        except ValueError:
            return None
        return state.get("run_id") if isinstance(state, dict) else None

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None."""
        try:
            manifest = _listed(path / COMPLETE)
            if _STATE not in manifest:
                return f"its list of files lacks {_STATE}"
            if self.averaged is not None and _AVERAGED not in manifest:
                return f"it has no {_AVERAGED}; older versions of hf_gem wrote averaged weights as a pickle"
            for name, expected in manifest.items():
                file = path / name
                if not file.exists():
                    return f"{name} is missing"
                if file.stat().st_size != expected["bytes"]:
                    return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
                if sha256(file) != expected["sha256"]:
                    return f"{name} is not what was written (SHA-256 differs)"
            for file in path.rglob("*"):
                name = file.relative_to(path).as_posix()
                if name not in manifest and _READ.fullmatch(file.name):
                    return f"{name} is not in its list of files; remove it, if nobody needs it"
            self._state(path)
        except (OSError, ValueError) as error:
            return f"it is not a complete checkpoint ({error})"
        return None


def written(folder: Path) -> list[str]:
    """The files of a complete checkpoint that a run wrote, as paths within its folder.

    Raises:
        ValueError: its list of files is damaged.
    """
    return [*_listed(folder / COMPLETE), COMPLETE]


def remove_all(folder: Path) -> None:
    """Removes all checkpoints from a folder of them, and the folder where nothing else lies in it."""
    for mark in {path for name in (COMPLETE, _PARTIAL) for path in folder.glob(f"*/{name}")}:
        if _NAME.fullmatch(mark.parent.name) or _ASIDE.fullmatch(mark.parent.name):
            _remove(mark.parent)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(folder: Path) -> None:
    """Removes the files that a run wrote into the folder of a checkpoint, and the folder where there are no others."""
    mark = folder / _PARTIAL
    if folder.is_symlink():
        return
    if (folder / COMPLETE).exists():
        (folder / COMPLETE).replace(mark)  # first, so that a kill half-way leaves nothing that looks whole
    if mark.stat().st_size == 0:  # half written, in a folder that the run had just made
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        listed = _listed(mark)
    except ValueError as error:
        warnings.warn(f"{folder} stays, since what a run wrote there is not known: {error}", stacklevel=2)
        return
    for name in listed:
        if not any(parent.is_symlink() for parent in (folder / name).parents if folder in parent.parents):
            (folder / name).unlink(missing_ok=True)
    mark.unlink()
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _listed(file: Path) -> dict[str, _File]:
    """What a mark lists.

    Raises:
        ValueError: it is not such a list, or names a file elsewhere.
    """
    found: dict[str, _File] = read_json(file, dict[str, _File])
    for name in found:
        if not is_inside(name):
            raise ValueError(f"{file} lists {name!r}, which is not a file in its folder")
    return found


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    name = _NAME.fullmatch(path.name)
    assert name is not None, path
    return int(name[1])


def _short(value: Any) -> str:
    return reprlib.repr(value)
