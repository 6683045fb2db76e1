"""Checkpoints that are complete or absent.

A checkpoint is written to a hidden folder beside its place and renamed into it; then a file `COMPLETE`, which lists
every file with its size and SHA-256, is renamed into the folder. Whatever lacks it, or does not match it, is not a
checkpoint. Older ones are deleted only after a newer one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from .errors import CheckpointError

_COMPLETE = "COMPLETE"
_STATE = "state.json"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: Where they lie, as `step_00000100` and so on.
        keep: Number of complete checkpoints to keep.
        identity: What has to be equal for a checkpoint to be continued: config fields and the hash of the data.
    """

    def __init__(self, folder: Path, keep: int, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.keep = keep
        self.identity = json.loads(json.dumps(identity))  # as it will read back: tuples become lists

    def complete(self) -> list[Path]:
        """Complete checkpoints, newest first. Their content is not verified yet."""
        return sorted((p.parent for p in self.folder.glob(f"step_*/{_COMPLETE}")), reverse=True)

    def save(self, accelerator: Accelerator, step: int) -> Path:
        """Saves model, optimizer, scaler and random states after `step` steps; all processes call it.

        Raises:
            CheckpointError: it cannot be written, for example because the disk is full. What was complete stays.
        """
        final = self.folder / f"step_{step:08d}"
        work = self.folder / f".{final.name}.partial"
        try:
            if accelerator.is_main_process:
                self.folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(work, ignore_errors=True)
            accelerator.wait_for_everyone()
            accelerator.save_state(str(work))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (work / _STATE).write_text(json.dumps({"step": step, "identity": self.identity}, indent=2))
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
        manifest = {
            path.relative_to(work).as_posix(): {"bytes": path.stat().st_size, "sha256": _flush_and_hash(path)}
            for path in sorted(work.rglob("*"))
            if path.is_file()
        }
        shutil.rmtree(final, ignore_errors=True)  # an incomplete or damaged one of the same step
        work.rename(final)
        mark = final / f".{_COMPLETE}"
        mark.write_text(json.dumps(manifest, indent=2))
        _flush_and_hash(mark)
        mark.rename(final / _COMPLETE)
        _flush_folder(final)
        _flush_folder(self.folder)
        for old in self.complete()[self.keep :]:
            (old / _COMPLETE).unlink()  # first, so that a kill half-way leaves nothing that looks whole
            shutil.rmtree(old)

    def restore(self, accelerator: Accelerator, resume: str) -> int:
        """Loads a checkpoint into what the accelerator has prepared.

        Args:
            accelerator: Holds the prepared model and optimizer.
            resume: `auto` for the newest good one, `never` to insist on a new run, or the path of one.

        Returns:
            The number of steps done, 0 where there is nothing to continue.

        Raises:
            CheckpointError: all checkpoints, or the one named, are damaged or belong to another run.
        """
        if resume not in ("auto", "never"):
            damage = _damage(Path(resume))
            if damage:
                raise CheckpointError(f"the checkpoint {resume} cannot be continued: {damage}")
            return self._load(accelerator, Path(resume))
        found = self.complete()
        if resume == "never":
            if found:
                raise CheckpointError(
                    f"{self.folder} holds {found[0].name} and --resume is never; choose another --output_dir, delete "
                    "the folder, or go on with --resume auto"
                )
            return 0
        damages = {}
        for path in found:
            damages[path] = _damage(path)
            if not damages[path]:
                return self._load(accelerator, path)
            if accelerator.is_main_process:
                warnings.warn(f"passing over the damaged checkpoint {path}: {damages[path]}", stacklevel=2)
        if damages:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged: "
                + "; ".join(f"{path.name}: {damage}" for path, damage in damages.items())
                + ". Restore one, or delete the folder to start anew"
            )
        return 0

    def _load(self, accelerator: Accelerator, path: Path) -> int:
        state = json.loads((path / _STATE).read_text())
        ours, theirs = self.identity, state["identity"]
        changed = [
            f"{name}: {theirs.get(name)!r} then, {ours.get(name)!r} now"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name) != theirs.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{path} belongs to another run ({'; '.join(changed)}); choose another --output_dir, or the values it "
                "was started with"
            )
        accelerator.load_state(str(path))
        return int(state["step"])


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / _COMPLETE).read_text())
        for name, expected in manifest.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if _hash(file) != expected["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is not a complete checkpoint ({error})"
    return None


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _flush_and_hash(path: Path) -> str:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _flush_folder(path: Path) -> None:
    """Makes renames inside a folder survive a power cut, where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it
    finally:
        os.close(descriptor)
