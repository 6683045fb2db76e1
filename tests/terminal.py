"""A terminal of a chosen size in place of standard error."""

import contextlib
import fcntl
import os
import struct
import sys
import termios
from unittest import mock


@contextlib.contextmanager
def terminal(columns):
    """Makes standard error a terminal; yields a function that returns what has been written to it so far."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    os.set_blocking(ours, False)
    shown = bytearray()

    def read():
        sys.stderr.flush()
        with contextlib.suppress(BlockingIOError):
            while part := os.read(ours, 65536):
                shown.extend(part)
        return shown.decode()

    with os.fdopen(theirs, "w") as stream, mock.patch.object(sys, "stderr", stream):
        yield read
    os.close(ours)
