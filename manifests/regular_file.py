"""Files that a user or a recipe names, opened only if they are regular files.

Opening a FIFO waits for a writer, a device may never end, and some act when they are opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from mmerge.manifests.limits import Limit

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "is a folder"),
    (stat.S_ISFIFO, errno.EINVAL, "is a FIFO"),
    (stat.S_ISSOCK, errno.EINVAL, "is a socket"),
    (stat.S_ISCHR, errno.EINVAL, "is a device"),
    (stat.S_ISBLK, errno.EINVAL, "is a device"),
)


def open_descriptor(path: str | Path) -> int:
    """Return a file descriptor of the regular file at `path`, to read.

    Raises:
        OSError: it is missing, cannot be opened, or is no regular file; `strerror` says why.
    """
    try:
        _check_mode(os.stat(path), path)  # noqa: PTH116 - the path may be no valid one
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as error:  # a NUL, or a character that no file name can have
        raise OSError(errno.EINVAL, f"is no path ({error})", str(path)) from error
    try:
        _check_mode(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _check_mode(status: os.stat_result, path: str | Path) -> None:
    for is_kind, number, reason in _KINDS:
        if is_kind(status.st_mode):
            raise OSError(number, f"{reason}, expected a regular file", str(path))


def open_regular_file(path: str | Path) -> BinaryIO:
    """Return the regular file at `path`, opened to read. Raises OSError as `open_descriptor`."""
    return os.fdopen(open_descriptor(path), "rb")


def read_regular_file(path: str | Path, *, limit: Limit) -> bytes:
    """Return the bytes of the regular file at `path`.

    Raises:
        OSError: as `open_descriptor`, or the file has more bytes than the limit.
    """
    with open_regular_file(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes <= limit.value:
            # Files of /proc have no size and any length.
            data = file.read(limit.value + 1)
            num_bytes = len(data)
    if num_bytes > limit.value:
        raise OSError(errno.EFBIG, limit.describe_excess(num_bytes), str(path))
    return data


def describe_os_error(error: OSError) -> str:
    """Return the reason of an error of the operating system, without number and path."""
    return error.strerror or str(error) or type(error).__name__
