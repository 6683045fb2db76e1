"""Pushing runs to the Hub. What fails there costs nothing here: files stay, and training goes on.

The token is that of `hf auth login` or $HF_TOKEN; nothing in this package reads, prints or stores it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import threading
from pathlib import Path

from huggingface_hub import HfApi

from .errors import PushError

_LAST = "last-checkpoint"  # as the Trainer of transformers calls it
_EXCLUDED = ["checkpoints/*", ".*", "**/.*"]


def push_run(repo_id: str, folder: Path, private: bool) -> str:
    """Pushes what a finished run left, without its checkpoints; returns the URL of the commit.

    Raises:
        PushError: it failed; the message has the command that finishes it.
    """
    try:
        return _upload(repo_id, folder, private, None, f"{folder.name}, finished")
    except Exception as error:  # of the client, the network or the Hub
        command = ["hf", "upload", repo_id, str(folder), ".", "--private" if private else "--no-private"]
        command += [part for pattern in _EXCLUDED for part in ("--exclude", pattern)]
        raise PushError(
            f"pushing to {repo_id} failed: {_reason(error)}. Everything is in {folder}; this finishes "
            f"it: {shlex.join(command)}"
        ) from error


class CheckpointPusher:
    """Pushes checkpoints as `last-checkpoint` in a thread of its own, one at a time.

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

    def push(self, checkpoint: Path) -> None:
        """Starts to push a complete checkpoint; does nothing while the one before is still on its way."""
        if self._thread is not None and self._thread.is_alive():
            return
        shutil.rmtree(self._copy, ignore_errors=True)
        try:  # the run deletes old checkpoints, and must not wait
            shutil.copytree(checkpoint, self._copy, copy_function=os.link)
        except OSError:  # a file system without hard links
            shutil.rmtree(self._copy, ignore_errors=True)
            shutil.copytree(checkpoint, self._copy)
        self._thread = threading.Thread(target=self._run, args=(checkpoint.name,), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is on its way any more."""
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self._copy, ignore_errors=True)

    def _run(self, name: str) -> None:
        try:
            _upload(self.repo_id, self._copy, self.private, _LAST, name)
        except Exception as error:  # of the client, the network or the Hub
            print(
                f"pushing {name} to {self.repo_id} failed: {_reason(error)}. Training goes on, and the "
                "next checkpoint is pushed in its place",
                file=sys.stderr,
                flush=True,
            )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def _upload(repo_id: str, folder: Path, private: bool, path: str | None, message: str) -> str:
    api = HfApi(library_name="hf_gem")
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        path_in_repo=path,
        commit_message=message,
        ignore_patterns=None if path else _EXCLUDED,
        delete_patterns="*" if path else None,  # files of an older checkpoint
    )
    return str(commit.commit_url)
