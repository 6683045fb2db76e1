"""Checks that nobody else can have written a folder or file. Code is only loaded from such places.

This file imports only the standard library, so that the build of the kernels can load it by itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path


def make_private(folder: Path) -> Path:
    """Creates a folder and its missing parents with mode 0700, and returns `checked(folder)`.

    Raises:
        OSError: The folder cannot be created, or others can write to it.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  # Path.resolve would follow dangling links
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    return checked(folder)


def checked(folder: Path) -> Path:
    """Returns the real path of a folder, after checking that only its user and the system can change its contents.

    Parent folders are checked too: someone who can rename a folder can put another one in its place. In a folder with
    the sticky bit, such as /tmp, only the owner can rename it.

    Raises:
        OSError: The folder does not exist, or others can write to it.
    """
    folder = folder.resolve(strict=True)  # the resolved path contains no links
    for path in (folder, *folder.parents):
        status = path.lstat()
        shared = _others_write(status) and (path == folder or not status.st_mode & stat.S_ISVTX)
        if shared or _is_strangers(status):
            raise PermissionError(
                f"others can write to {path}, which has mode {stat.S_IMODE(status.st_mode):04o} and belongs to user "
                f"{status.st_uid}. Code is only loaded from folders that nobody else can write to"
            )
    return folder


def seal(file: Path) -> str:
    """Returns the expected content of `FILE.sha256`, the checksum next to a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def seal_of(file: Path) -> Path:
    """Returns the path of the checksum of a file."""
    return file.with_name(file.name + ".sha256")


def is_intact(file: Path) -> bool:
    """Returns whether a file in a `checked` folder exists, is no link, is this user's own and matches its checksum."""
    try:
        status = file.lstat()
        own = stat.S_ISREG(status.st_mode) and not _is_strangers(status) and not _others_write(status)
        return own and seal_of(file).read_text(encoding="ascii", errors="replace") == seal(file)
    except FileNotFoundError:
        return False


def _is_strangers(status: os.stat_result) -> bool:
    """Returns whether a file belongs to neither this user nor the system.

    The owner of `/` counts as the system too, since root may have another user number in a container.
    """
    if not hasattr(os, "geteuid"):
        return False  # on Windows, only the user can access a home folder
    return status.st_uid not in (os.geteuid(), 0, Path("/").stat().st_uid)


def _others_write(status: os.stat_result) -> bool:
    if not hasattr(os, "geteuid"):
        return False
    return bool(status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_own_group(status)))


def _is_own_group(status: os.stat_result) -> bool:
    """Returns whether a group is the user's private group, which has no other members."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and group.gr_gid == user.pw_gid and set(group.gr_mem) <= {user.pw_name}
