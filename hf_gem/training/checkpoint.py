"""Checkpoints that are complete or absent.

A checkpoint is written to a hidden folder beside its place and renamed into it; then a file `COMPLETE`, which lists
every file with its size and SHA-256, is renamed into the folder. Whatever lacks it, or does not match it, is not a
checkpoint. Older ones are deleted only after a newer one is complete.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from ..files import flush, sha256, write_atomically
from .errors import CheckpointError

_COMPLETE = "COMPLETE"
_STATE = "state.json"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie, as `step_00000100` and so on.
        keep: Number of complete checkpoints to keep.
        identity: What has to be equal for a checkpoint to be continued, and on all processes of a run: config fields
            and the hash of the data.
    """

    def __init__(self, folder: Path, keep: int, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = json.loads(json.dumps(identity))  # as it will read back: tuples become lists

    def complete(self) -> list[Path]:
        """Complete checkpoints, newest first. Their content is not verified yet."""
        return sorted((p.parent for p in self.folder.glob(f"step_*/{_COMPLETE}")), reverse=True)

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
            accelerator.wait_for_everyone()
            accelerator.save_state(str(work))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                content = {"step": step, "identity": self.identity, "state": state}
                (work / _STATE).write_text(json.dumps(content, indent=2))
                self._publish(work, final)
        except (OSError, RuntimeError, SafetensorError) as error:
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
        for path in sorted(p for p in work.rglob("*") if p.is_file()):
            flush(path)
            manifest[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        if (final / _COMPLETE).exists():
            self._set_aside(final)
        work.rename(final)
        write_atomically(final / _COMPLETE, json.dumps(manifest, indent=2))
        flush(self.folder)
        for old in self.complete()[self.keep :]:
            (old / _COMPLETE).unlink()  # first, so that a kill half-way leaves nothing that looks whole
            shutil.rmtree(old)

    def _sweep(self) -> None:
        """Removes what a kill left half-written or half-deleted."""
        unmarked = [path for path in self.folder.glob("step_*") if not (path / _COMPLETE).exists()]
        for path in [*self.folder.glob(".step_*"), *unmarked]:
            shutil.rmtree(path, ignore_errors=True)

    def _set_aside(self, path: Path) -> None:
        aside = path.with_name(f"set_aside_{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
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
            content = json.loads((path / _STATE).read_text())
            accelerator.load_state(str(path))
        except OSError as missing:
            raise CheckpointError(
                f"process {accelerator.process_index} cannot read {path}, which process 0 continues: {missing}; "
                "--output_dir has to be a folder that all machines see"
            ) from missing
        return int(content["step"]), content["state"]

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
            mine, theirs = (_run_id(path) for path in (found[0], Path(resume)))
            if mine != theirs:
                raise CheckpointError(
                    f"{self.folder} holds another run than {resume}; choose another --output_dir, or --resume auto"
                )
            named = False
        damages: dict[Path, str | None] = {}
        for path in [Path(resume)] if named else found:
            damages[path] = _damage(path)
            if not damages[path]:
                theirs = json.loads((path / _STATE).read_text())["identity"]
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
            f"{name}: {theirs.get(name)!r} in {whose}, {ours.get(name)!r} in {who}"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"these are different runs ({'; '.join(changed)}); choose another --output_dir, or the same values"
            )


def _run_id(path: Path) -> Any:
    try:
        return (json.loads((path / _STATE).read_text())["state"] or {}).get("run_id")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / _COMPLETE).read_text())
        if _STATE not in manifest:
            return f"its list of files lacks {_STATE}"
        for name, expected in manifest.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if sha256(file) != expected["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is not a complete checkpoint ({error})"
    return None
