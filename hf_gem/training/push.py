"""Pushing runs to the Hub. What fails there costs nothing here: files stay, and training goes on.

The token is that of `hf auth login` or $HF_TOKEN; nothing in this package reads, prints or stores it.
"""

from __future__ import annotations

import glob
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi

from ..files import redact
from .checkpoint import written
from .errors import PushError
from .signals import check

_LAST = "last-checkpoint"  # as the Trainer of transformers calls it
_LOOK_EVERY = 0.2  # seconds


def push_run(repo_id: str, folder: Path, files: Sequence[str], private: bool) -> str:
    """Pushes some files of a finished run.

    Args:
        repo_id: `USER/NAME`.
        folder: The output folder of the run.
        files: Their paths within it.
        private: Whether the repository is made a private one, if it has to be made.

    Returns:
        The URL of the commit.

    Raises:
        PushError: it failed; the message has the command that finishes it.
    """
    try:
        return _upload(repo_id, folder, files, private, None, f"{folder.name}, finished")
    except Exception as error:  # of the client, the network or the Hub
        command = ["hf", "upload", repo_id, str(folder), ".", "--private" if private else "--no-private"]
        command += [part for name in files for part in ("--include", glob.escape(name))]
        raise PushError(
            f"pushing to {repo_id} failed: {_reason(error)}. Everything is in {folder}; this finishes "
            f"it: {shlex.join(command)}"
        ) from error


class CheckpointPusher:
    """Pushes checkpoints as `last-checkpoint` in a thread of its own, the newest one whenever it is free.

    Args:
        repo_id: `USER/NAME`.
        folder: The output folder of the run.
        private: Whether the repository is made a private one, if it has to be made.
    """

    def __init__(self, repo_id: str, folder: Path, private: bool) -> None:
        self.repo_id = repo_id
        self.private = private
        self._copy = folder / ".pushing"
        self._thread: threading.Thread | None = None
        self._left: Path | None = None  # the newest checkpoint, if it came while another was on its way

    def push(self, checkpoint: Path) -> None:
        """Starts to push a complete checkpoint, unless the one before is still on its way."""
        if self._thread is not None and self._thread.is_alive():
            self._left = checkpoint
            return
        self._left = None
        try:  # the run deletes old checkpoints, and must not wait
            files = written(checkpoint)
            _copy(checkpoint, files, self._copy)
        except (OSError, ValueError) as error:
            print(f"{checkpoint.name} is not pushed: {error}", file=sys.stderr, flush=True)
            return
        self._thread = threading.Thread(target=self._run, args=(checkpoint.name, files), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when the newest checkpoint has been pushed.

        Raises:
            Interrupted: a signal arrived before.
        """
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK_EVERY)
            check("stopped while the last checkpoint was pushed; it is saved here, and the same command goes on")
        if self._left is not None:
            self.push(self._left)
            self.wait()
        shutil.rmtree(self._copy, ignore_errors=True)

    def _run(self, name: str, files: Sequence[str]) -> None:
        try:
            _upload(self.repo_id, self._copy, files, self.private, _LAST, name)
        except Exception as error:  # of the client, the network or the Hub
            print(
                f"pushing {name} to {self.repo_id} failed: {_reason(error)}. Training goes on, and the "
                "next checkpoint is pushed in its place",
                file=sys.stderr,
                flush=True,
            )


def _copy(folder: Path, files: Sequence[str], to: Path) -> None:
    for copy in (os.link, shutil.copy2):  # the second one where the file system has no hard links
        shutil.rmtree(to, ignore_errors=True)
        try:
            for name in files:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                copy(folder / name, to / name)
            return
        except OSError:
            if copy is shutil.copy2:
                raise


def _reason(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}")


def _upload(repo_id: str, folder: Path, files: Sequence[str], private: bool, path: str | None, message: str) -> str:
    api = HfApi(library_name="hf_gem")
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=path,
        commit_message=message,
        allow_patterns=[glob.escape(name) for name in files],
        delete_patterns="*" if path else None,  # files of an older checkpoint
    )
    return str(commit.commit_url)
