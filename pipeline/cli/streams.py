"""The standard streams of a command: closed ones are replaced, and every text can be printed."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path


def prepare_streams() -> None:
    """Make stdout and stderr take any text, whatever their encoding and even if they are closed.

    A character that the encoding lacks is written as an escape. A closed stream is replaced by
    /dev/null: otherwise the next file that is opened would get its number, and what a library
    prints there.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Write what is buffered, so that a full disk is an error of the command. Raises OSError."""
    sys.stdout.flush()


def discard_stdout() -> None:
    """Send what stdout still holds nowhere: a reader is gone, or the disk is full."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_closed_pipe(error: BaseException) -> bool:
    """Return whether the reader of the output has ended, as `head` does."""
    return isinstance(error, OSError) and error.errno == errno.EPIPE
