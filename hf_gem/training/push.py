"""Pushes runs to the Hub. If a push fails, nothing is lost: the files stay on disk, and training continues.

The token comes from `hf auth login` or $HF_TOKEN. Nothing in this package reads, prints or stores it.
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

from ..files import shown
from .checkpoint import written
from .errors import PushError, reason
from .signals import wait_for

_LAST = "last-checkpoint"  # as the Trainer of transformers calls it
_STOPPED = "stopped while pushing the last checkpoint, which is saved; run the same command again to continue"


def push_run(repo_id: str, folder: Path, files: Sequence[str], private: bool) -> str:
    """Pushes files of a finished run.

    Args:
        repo_id: The repository, as `USER/NAME`.
        folder: The output folder of the run.
        files: Paths of the files, relative to the folder.
        private: Whether to make the repository private if it does not exist yet.

    Returns:
        The URL of the commit.

    Raises:
        PushError: The push failed. The message contains a command that finishes it.
    """
    try:
        return _upload(repo_id, folder, files, private, None, f"{folder.name}, finished")
    except Exception as error:  # client, network and Hub raise many kinds
        command = ["hf", "upload", repo_id, str(folder), ".", "--private" if private else "--no-private"]
        command += [part for name in files for part in ("--include", glob.escape(name))]
        raise PushError(
            f"cannot push to {shown(repo_id)}: {reason(error)}. All files are in {folder}. To finish the push, run: "
            f"{shlex.join(command)}"
        ) from error


class CheckpointPusher:
    """Pushes checkpoints as `last-checkpoint` from a background thread. Whenever it is idle, it takes the newest one.

    Args:
        repo_id: The repository, as `USER/NAME`.
        folder: The output folder of the run.
        private: Whether to make the repository private if it does not exist yet.
    """

    def __init__(self, repo_id: str, folder: Path, private: bool) -> None:
        self.repo_id = repo_id
        self.private = private
        self._copy = folder / ".pushing"
        self._thread: threading.Thread | None = None
        self._left: Path | None = None  # the newest checkpoint, if it came during another push

    def push(self, checkpoint: Path) -> None:
        """Starts to push a complete checkpoint, unless the previous push is still running."""
        if self._thread is not None and self._thread.is_alive():
            self._left = checkpoint
            return
        self._left = None
        try:  # push a copy: the run deletes old checkpoints and must not wait
            files = written(checkpoint)
            _copy(checkpoint, files, self._copy)
        except (OSError, ValueError) as error:
            print(f"cannot push {checkpoint.name}: {error}", file=sys.stderr, flush=True)
            return
        self._thread = threading.Thread(target=self._run, args=(checkpoint.name, files), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until the newest checkpoint has been pushed.

        Raises:
            Interrupted: A signal arrived first.
        """
        if self._thread is not None and self._thread.is_alive():
            wait_for(self._thread.join, _STOPPED)
        if self._left is not None:
            self.push(self._left)
            self.wait()
        shutil.rmtree(self._copy, ignore_errors=True)

    def _run(self, name: str, files: Sequence[str]) -> None:
        try:
            _upload(self.repo_id, self._copy, files, self.private, _LAST, name)
        except Exception as error:  # client, network and Hub raise many kinds
            print(
                f"cannot push {name} to {shown(self.repo_id)}: {reason(error)}. Training continues, and the next "
                "checkpoint will be pushed instead.",
                file=sys.stderr,
                flush=True,
            )


def _copy(folder: Path, files: Sequence[str], to: Path) -> None:
    for copy in (os.link, shutil.copy2):  # copy2 for file systems without hard links
        shutil.rmtree(to, ignore_errors=True)
        try:
            for name in files:
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                copy(folder / name, to / name)
            return
        except OSError:
            if copy is shutil.copy2:
                raise


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
