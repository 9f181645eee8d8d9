"""Open files that someone else named."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path


def open_regular(path: Path) -> io.FileIO:
    """Open a file for reading, unbuffered, if it is a regular one: a pipe would block, and a device might never end.

    Raises
    ------
    OSError
        If it cannot be opened, or is something else.
    """
    if "\0" in str(path):
        raise OSError(errno.ENOENT, "the name holds a NUL", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a directory", str(path))
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return io.FileIO(fd, "rb")
