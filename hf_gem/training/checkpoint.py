"""Checkpoints that are complete or absent.

A checkpoint is first written to a hidden folder next to its final place, and that folder is then renamed. Last, a file
`COMPLETE` is moved into it, which lists every file with its size and SHA-256. A folder without that file, or with files
that do not match it, is not a checkpoint. Old checkpoints are deleted only after a newer one is complete. A file
`PARTIAL` marks a folder that is half written or half deleted. A folder with neither mark is never deleted.

A checkpoint may come from an untrusted source, so loading one never runs code from it. Weights are safetensors, and
`torch.load` reads everything else with `weights_only=True`. The SHA-256 detects damage; it does not prove who wrote the
file.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from ..files import flush, is_inside, read_json, redacted, sha256, shown, write_atomically
from .errors import CheckpointError, reason
from .record import check_saved
from .sharded import is_sharded, load_sharded

COMPLETE = "COMPLETE"
_PARTIAL = "PARTIAL"
_STATE = "state.json"
_AVERAGED = "averaged.safetensors"
_NAME, _ASIDE = re.compile(r"step_(\d{8,})"), re.compile(r"set_aside_step_\d{8,}(_\d+)?")
# Files that loading may open, except the hidden copies that macOS makes. COMPLETE has to list all of them.
_READ = re.compile(r"(?!\._).*\.(?:safetensors|bin|pt|pkl|json|distcp|metadata)")


class _File(TypedDict):
    bytes: int
    sha256: str


class _LaterInState(TypedDict, total=False):
    went_back_to: str


class _State(_LaterInState):
    step: int
    identity: dict[str, Any]
    state: Any


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: The folder that holds the checkpoints, named `step_00000100` and so on.
        keep: Number of complete checkpoints to keep.
        identity: Config fields and the hash of the data. A checkpoint is only resumed if its identity is the same, and
            all processes of a run must have the same identity.
        averaged: A module with averaged weights, the same in all processes, or None.
    """

    def __init__(self, folder: Path, keep: int, identity: Mapping[str, Any], averaged: nn.Module | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = json.loads(json.dumps(redacted(identity)))  # tuples become lists, as they will when read back
        self.averaged = averaged
        self._went_back_to: str | None = None  # name of the checkpoint that the run last went back to

    def complete(self) -> list[Path]:
        """Returns the complete checkpoints, newest first, without verifying their content."""
        found = [path.parent for path in self.folder.glob(f"step_*/{COMPLETE}") if _NAME.fullmatch(path.parent.name)]
        return sorted(found, key=_step_of, reverse=True)

    def save(self, accelerator: Accelerator, step: int, state: Mapping[str, Any]) -> Path:
        """Saves model, optimizer, scaler and random states. All processes must call it.

        Args:
            accelerator: The accelerator with the prepared model and optimizer.
            step: Number of steps done.
            state: The part of the run's record to save, which `check_saved` describes.

        Raises:
            CheckpointError: The checkpoint cannot be written, for example because the disk is full. Complete
                checkpoints are kept.
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
                content: _State = {"step": step, "identity": self.identity, "state": state}
                if self._went_back_to:
                    content["went_back_to"] = self._went_back_to
                (work / _STATE).write_text(json.dumps(content, indent=2))
                self._publish(work, final)
        except (OSError, RuntimeError, SafetensorError) as error:
            if (work / _PARTIAL).exists():
                shutil.rmtree(work, ignore_errors=True)
            newest = next(iter(self.complete()), None)
            free = shutil.disk_usage(self.folder if self.folder.exists() else Path()).free
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.folder}: {error} ({free / 1e9:.2f} GB free). "
                f"{f'The checkpoint {newest} is complete' if newest else 'There is no older checkpoint'}. "
                "Free some space and run the same command again."
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
        """Removes checkpoints that a killed process left half written or half deleted."""
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
        """Loads a checkpoint into the prepared model and optimizer. All processes must call it.

        The main process chooses the checkpoint. Checkpoints that are damaged, or newer than the chosen one, are renamed
        to `set_aside_…`. They no longer belong to the run, and nothing deletes them.

        Args:
            accelerator: The accelerator with the prepared model and optimizer.
            resume: `auto` for the newest intact checkpoint, `never` to insist on a new run, or the path of one. If this
                run has continued from the one at that path, this means `auto`: the same command may be run again.

        Returns:
            The number of steps done and the state that was saved, or 0 and None if there is no checkpoint.

        Raises:
            CheckpointError: All checkpoints, or the named one, are damaged or belong to another run, or the processes
                disagree on data or configuration.
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
                f"process {accelerator.process_index} cannot read the checkpoint {path} that process 0 resumes from: "
                f"{missing}. All machines must see the same --output_dir. Use a shared folder."
            ) from missing
        except Exception as error:  # torch, accelerate and safetensors raise many kinds for files they did not write
            raise CheckpointError(
                f"cannot load the checkpoint {path}: {reason(error)}. It belongs to another run or was changed. Name "
                "another checkpoint with --resume, or choose another --output_dir."
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
        """Reads the state that is saved next to weights and optimizer.

        Raises:
            ValueError: The file does not hold the state of a run.
        """
        content: _State = read_json(path / _STATE, _State)
        check_saved(content["state"], f"{path / _STATE}: state")
        if content["step"] < 1:
            raise ValueError(f"{path / _STATE}: step must be at least 1, got {content['step']}")
        if _NAME.fullmatch(path.name) and _step_of(path) != content["step"]:
            raise ValueError(f"{path / _STATE}: step must be that of {path.name}, got {content['step']}")
        return content

    def _choose(self, resume: str) -> Path | None:
        """Returns the verified checkpoint to resume from, or None for a new run."""
        found = self.complete()
        if resume == "never":
            if found:
                raise CheckpointError(
                    f"{self.folder} already holds {found[0].name}, but --resume is never. Choose another --output_dir, "
                    "delete the folder, or use --resume auto."
                )
            return None
        named = resume != "auto"
        if named and self._has_continued_from(Path(resume), found):
            print(
                f"this run has continued from {shown(resume)} before, and now continues from its newest checkpoint. To "
                f"go back again, first move newer checkpoints out of {self.folder}"
            )
            named = False
        damages: dict[Path, str | None] = {}
        for path in [Path(resume)] if named else found:
            damages[path] = self._damage(path)
            if not damages[path]:
                state = self._state(path)
                self._compare(state["identity"], self.identity, str(path), "this command")
                if named:
                    self._went_back_to = path.resolve().name if self._holds(path) else None
                else:
                    self._went_back_to = state.get("went_back_to", self._went_back_to)
                for other in found:
                    if _step_of(other) > state["step"]:
                        self._set_aside(other)
                return path
            if not named:
                warnings.warn(f"skipping the damaged checkpoint {path}: {damages[path]}", stacklevel=2)
        if named:
            raise CheckpointError(
                f"cannot resume from the checkpoint {shown(resume)}: {damages[Path(resume)]}. Name an intact "
                "checkpoint, or use --resume auto."
            )
        if damages:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged: "
                + "; ".join(f"{path.name}: {damage}" for path, damage in damages.items())
                + ". Restore one, or delete the folder to start over."
            )
        return None

    def _has_continued_from(self, path: Path, found: list[Path]) -> bool:
        """Returns whether this run has gone on from a checkpoint that --resume names.

        Args:
            path: The checkpoint. It may have been deleted since, because newer ones took its place.
            found: The complete checkpoints of this run, newest first.

        Raises:
            CheckpointError: The checkpoint is of another run.
        """
        if not found:
            return False
        if self._holds(path):
            return self._peek(found[0]).get("went_back_to") == path.resolve().name
        if not path.is_dir():
            return False
        if self._run_id(found[0]) != self._run_id(path):  # otherwise the run was copied here
            raise CheckpointError(
                f"{self.folder} holds a different run than {shown(str(path))}. Choose another --output_dir, or use "
                "--resume auto."
            )
        return True

    def _holds(self, path: Path) -> bool:
        return path.resolve().parent == self.folder.resolve()

    def _compare(self, theirs: dict[str, Any], ours: dict[str, Any], whose: str, who: str) -> None:
        changed = [
            f"{name} is {shown(theirs.get(name))} in {whose} and {shown(ours.get(name))} in {who}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"the configurations differ: {'; '.join(changed)}. A run can only resume with the same values. Use "
                "those, or choose another --output_dir."
            )

    def _peek(self, path: Path) -> Mapping[str, Any]:
        """Returns the state of a checkpoint, which may be damaged. It is empty if it cannot be read."""
        try:
            return self._state(path)
        except ValueError:
            return {}

    def _run_id(self, path: Path) -> Any:
        state = self._peek(path).get("state")
        return state.get("run_id") if isinstance(state, dict) else None

    def _damage(self, path: Path) -> str | None:
        """Returns what is wrong with a checkpoint, or None."""
        try:
            manifest = _listed(path / COMPLETE)
            if _STATE not in manifest:
                return f"its list of files lacks {_STATE}"
            if self.averaged is not None and _AVERAGED not in manifest:
                return f"it has no {_AVERAGED} (older versions of hf_gem stored averaged weights as a pickle)"
            for name, expected in manifest.items():
                file = path / name
                if not file.exists():
                    return f"{name} is missing"
                if file.stat().st_size != expected["bytes"]:
                    return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
                if sha256(file) != expected["sha256"]:
                    return f"{name} was changed (its SHA-256 differs)"
            for file in path.rglob("*"):
                name = file.relative_to(path).as_posix()
                if name not in manifest and _READ.fullmatch(file.name):
                    return f"{name} is not in its list of files; remove it if you do not need it"
            self._state(path)
        except (OSError, ValueError) as error:
            return f"it is not a complete checkpoint ({error})"
        return None


def written(folder: Path) -> list[str]:
    """Lists the files that a run wrote into a complete checkpoint, as paths relative to its folder.

    Raises:
        ValueError: The list of files is damaged.
    """
    return [*_listed(folder / COMPLETE), COMPLETE]


def remove_all(folder: Path) -> None:
    """Removes all checkpoints from a folder, and the folder itself if that leaves it empty."""
    for mark in {path for name in (COMPLETE, _PARTIAL) for path in folder.glob(f"*/{name}")}:
        if _NAME.fullmatch(mark.parent.name) or _ASIDE.fullmatch(mark.parent.name):
            _remove(mark.parent)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _remove(folder: Path) -> None:
    """Removes the files that a run wrote into a checkpoint, and the folder itself if that leaves it empty."""
    mark = folder / _PARTIAL
    if folder.is_symlink():
        return
    if (folder / COMPLETE).exists():
        (folder / COMPLETE).replace(mark)  # first, so that a kill midway leaves nothing that looks complete
    if mark.stat().st_size == 0:  # half written: the run had just made the folder
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        listed = _listed(mark)
    except ValueError as error:
        warnings.warn(f"keeping {folder}, because its list of files cannot be read: {error}", stacklevel=2)
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
    """Reads the list of files in a mark.

    Raises:
        ValueError: It is not such a list, or it names a file outside the folder.
    """
    found: dict[str, _File] = read_json(file, dict[str, _File])
    for name in found:
        if not is_inside(name):
            raise ValueError(f"{file} lists {shown(name)}, which is outside its folder")
    return found


def _step_of(path: Path) -> int:
    """Returns the step in the name of a checkpoint."""
    name = _NAME.fullmatch(path.name)
    assert name is not None, path
    return int(name[1])
