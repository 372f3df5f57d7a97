"""Bytes of local files without a copy: mapped block by block, each block made present before it is touched.

A mapped page that cannot be read (the file was cut short, the disk is broken) ends a process that touches it. Asking the system
to populate the block first returns an error instead; objects are immutable, so a block that was there stays.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

RELEASED_BYTES = 8 << 20
"""Bytes that leave the map at once."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which Python does not name."""


def read_mapped(path: Path, *, offset: int, num_bytes: int, block_bytes: int) -> Iterator[memoryview]:
    """Yield bytes `offset` to `offset + num_bytes` of a file in blocks of `block_bytes`, the last may be shorter.

    A block is to be read from while it is the current one.

    Raises:
        EOFError: the file is shorter; the message is its size.
        OSError: it cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size < offset + num_bytes:
            raise EOFError(str(size))
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # what the page cache lacks is on its way before it is waited for
                os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_WILLNEED)
        begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(descriptor, offset + num_bytes - begin, prot=mmap.PROT_READ, offset=begin)
        view = memoryview(mapped)[offset - begin :]
        can_populate = True
        released = 0
        for start in range(0, num_bytes, block_bytes):
            stop = min(start + block_bytes, num_bytes)
            if start - released >= RELEASED_BYTES and can_populate:
                released = _release(mapped, released, offset - begin + start)
            can_populate = can_populate and _populate(mapped, offset - begin + start, offset - begin + stop)
            yield view[start:stop] if can_populate else _pread(descriptor, offset + start, stop - start)
    finally:
        os.close(descriptor)


def _release(mapped: mmap.mmap, first: int, last: int) -> int:
    """Take what lies before `last` out of the map, so that pages which were read do not count as memory; return where that ends."""
    last = last // mmap.PAGESIZE * mmap.PAGESIZE
    mapped.madvise(mmap.MADV_DONTNEED, first, last - first)
    return last


def _populate(mapped: mmap.mmap, start: int, stop: int) -> bool:
    """Make a part of a mapping present; False where the system cannot be asked to. Raises OSError when the file cannot be read."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    try:
        mapped.madvise(_POPULATE_READ, first, stop - first)
    except (AttributeError, OSError) as error:
        if isinstance(error, AttributeError) or error.errno == errno.EINVAL:
            return False
        raise OSError(errno.EIO, "the file cannot be read, or was cut short meanwhile") from error
    return True


def _pread(descriptor: int, offset: int, num_bytes: int) -> memoryview:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while view:
        part = os.pread(descriptor, len(view), offset)
        if not part:
            raise OSError(errno.EIO, "the file was cut short meanwhile")
        view[: len(part)] = part
        view, offset = view[len(part) :], offset + len(part)
    return memoryview(data)
