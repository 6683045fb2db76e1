"""Folders and files that nobody else can have written: code is loaded from nowhere else.

Python's own library is all that it needs, so that the build of the kernels can load this file by itself.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path


def make_private(folder: Path) -> Path:
    """Makes a folder where it is missing, with mode 0700 as those around it, and returns `checked` of it.

    Raises:
        OSError: it cannot be made, or others could write to it.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  # Path.resolve would follow links that dangle
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
    return checked(folder)


def checked(folder: Path) -> Path:
    """The real path of a folder, once it is certain that only its user and the system can change what is in it.

    Folders above it count too, since who can rename one can put another in its place. In those with the sticky bit,
    such as /tmp, only owners can do that.

    Raises:
        OSError: the folder is not there, or others could write to it.
    """
    folder = folder.resolve(strict=True)  # and no links from here on
    for path in (folder, *folder.parents):
        status = path.lstat()
        shared = _others_write(status) and (path == folder or not status.st_mode & stat.S_ISVTX)
        if shared or _is_strangers(status):
            raise PermissionError(
                f"others can write to {path}, which has mode {stat.S_IMODE(status.st_mode):04o} and belongs to user "
                f"{status.st_uid}; code is loaded from folders that nobody else can write to"
            )
    return folder


def seal(file: Path) -> str:
    """What the checksum beside a file, `FILE.sha256`, has to say."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def seal_of(file: Path) -> Path:
    """The file with the checksum of a file."""
    return file.with_name(file.name + ".sha256")


def is_intact(file: Path) -> bool:
    """Whether a file in a folder that is `checked` is there, no link, nobody else's, and whole by its checksum."""
    try:
        status = file.lstat()
        own = stat.S_ISREG(status.st_mode) and not _is_strangers(status) and not _others_write(status)
        return own and seal_of(file).read_text(encoding="ascii", errors="replace") == seal(file)
    except FileNotFoundError:
        return False


def _is_strangers(status: os.stat_result) -> bool:
    """Whether something belongs to neither this user nor the system. Who has `/` owns the system: in a container the
    user's number of root may be another one."""
    if not hasattr(os, "geteuid"):
        return False  # Windows, where a home is its user's alone
    return status.st_uid not in (os.geteuid(), 0, Path("/").stat().st_uid)


def _others_write(status: os.stat_result) -> bool:
    if not hasattr(os, "geteuid"):
        return False
    return bool(status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_own_group(status)))


def _is_own_group(status: os.stat_result) -> bool:
    """Whether a group is the one that many systems give to each user, with nobody else in it."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and group.gr_gid == user.pw_gid and set(group.gr_mem) <= {user.pw_name}
