"""Bytes of local files, block by block, into memory that the caller names or into one buffer that
stays in the caches.

Both readers of local files, this one and that of the merge's inputs
(workers/checkpoints/block_reader.py), read by `preadv`: this one checks the bytes of one range on
their way, that one keeps files open and reads several in step. Mapping the files costs more,
measured for both: bringing pages into a map and out of it takes as long as the copy, and a digest
reads what was just copied from a cache.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOM_BYTES = 2 << 20
"""A large page. Reading into small pages was measured to take three times as long where the memory
is more than a few of them.
"""
_rooms: list[NDArray[np.uint8]] = []
"""Memory for blocks that no reader uses now: as much as there were readers at once."""


def read_local(
    path: Path,
    *,
    offset: int,
    num_bytes: int,
    block_bytes: int,
    into: NDArray[np.uint8] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Yield bytes `offset` to `offset + num_bytes` of a file in blocks of `block_bytes`, the last
    may be shorter.

    With `into`, uint8 [num_bytes], the blocks lie there one behind the other and stay; otherwise a
    block is to be read from while it is the current one.

    Raises:
        EOFError: the file is shorter; the message is its size.
        OSError: it cannot be opened or read.
    """
    room = None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size < offset + num_bytes:
            raise EOFError(str(size))
        if hasattr(os, "posix_fadvise"):
            # What the page cache lacks is fetched ahead while blocks are used. To ask for the whole
            # range (WILLNEED) waits for its requests to be taken: measured, files that were not
            # cached loaded a third slower.
            with suppress(OSError):
                os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_SEQUENTIAL)
        room = _take_room(min(block_bytes, num_bytes)) if into is None else into
        for start in range(0, num_bytes, block_bytes):
            length = min(block_bytes, num_bytes - start)
            block = room[:length] if into is None else room[start : start + length]
            _read_whole(descriptor, block, offset + start)
            yield block
    finally:
        os.close(descriptor)
        if into is None and room is not None:
            _rooms.append(room)


def read_local_start(path: Path, *, num_bytes: int) -> tuple[memoryview, int]:
    """Return the first `num_bytes` bytes of a file, fewer if it is shorter, and the size of the
    whole. Raises OSError; for an empty one too.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            raise OSError(errno.EIO, "has no bytes")
        data = np.empty(min(num_bytes, size), np.uint8)
        _read_whole(descriptor, data, 0)
        return data.data, size
    finally:
        os.close(descriptor)


def _take_room(num_bytes: int) -> NDArray[np.uint8]:
    """Return memory of so many bytes or more, in one large page where the system has such, that
    nothing else uses.
    """
    with suppress(IndexError):
        room = _rooms.pop()
        if len(room) >= num_bytes:
            return room
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.empty(num_bytes, np.uint8)
    num_bytes = max(num_bytes, ROOM_BYTES)
    # Private: shared memory gets no large pages.
    mapped = mmap.mmap(-1, num_bytes + ROOM_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(mapped, np.uint8)
    start = -room.ctypes.data % ROOM_BYTES
    return room[start : start + num_bytes]


def _read_whole(descriptor: int, block: NDArray[np.uint8], offset: int) -> None:
    view = block.data
    while view:
        count = _read(descriptor, view, offset)
        if not count:
            raise OSError(errno.EIO, "the file was cut short meanwhile")
        view, offset = view[count:], offset + count


def _read(descriptor: int, view: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], offset)
    data = os.pread(descriptor, view.nbytes, offset)
    view[: len(data)] = data
    return len(data)
