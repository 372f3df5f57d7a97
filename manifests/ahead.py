"""Reading over a network: large ranges in parallel parts, and ahead of a reader that goes on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

PART_BYTES = 8 << 20
"""Bytes of one request of a reader that goes forward."""
RANGE_PART_BYTES = 32 << 20
"""Bytes of one request of a large range, which is read as several at once."""
NUM_PARTS = 6
"""Ranged requests on their way at once, per process."""
AHEAD_PARTS = 2
"""Parts that are fetched ahead of a sequential reader, for each file it reads."""
AHEAD_BYTES = (AHEAD_PARTS + 1) * PART_BYTES
"""The most that is held for one file that is read forward."""

ReadRange = Callable[[int, int], memoryview]
"""Reads (offset, num_bytes) of one object in one request."""


@cache
def _pool() -> ThreadPoolExecutor:
    # The library leaves Python's lock while it waits, so threads are enough.
    return ThreadPoolExecutor(NUM_PARTS, thread_name_prefix="mmerge-read")


def read_in_parts(read: ReadRange, offset: int, num_bytes: int) -> memoryview:
    """Return a range of an object, read as parts of 32 MiB in parallel where it is larger than two of them."""
    if num_bytes <= 2 * RANGE_PART_BYTES:  # putting parts together costs a copy
        return read(offset, num_bytes)
    starts = range(offset, offset + num_bytes, RANGE_PART_BYTES)
    parts = [_pool().submit(read, start, min(RANGE_PART_BYTES, offset + num_bytes - start)) for start in starts]
    whole = memoryview(bytearray(num_bytes))
    try:
        for start, part in zip(starts, parts, strict=True):
            data = part.result()
            whole[start - offset : start - offset + len(data)] = data
    finally:
        for part in parts:
            part.cancel()
    return whole.toreadonly()


class ForwardReader:
    """Reads one range of an object piece by piece, forward, with the next parts on their way. Not for several threads."""

    def __init__(self, read: ReadRange, *, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._read = read
        self._parts: dict[int, Future[memoryview]] = {}

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return bytes of the range; parts before `offset`, and far behind it, are forgotten."""
        first, last = (offset - self.start) // PART_BYTES, (offset + num_bytes - 1 - self.start) // PART_BYTES
        for index in [index for index in self._parts if not first <= index <= last + AHEAD_PARTS]:
            self._parts.pop(index).cancel()
        for index in range(first, last + 1 + AHEAD_PARTS):
            self._fetch(index)
        pieces = [self._cut(index, offset, num_bytes) for index in range(first, last + 1)]
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _fetch(self, index: int) -> None:
        begin = self.start + index * PART_BYTES
        if index not in self._parts and begin < self.stop:
            self._parts[index] = _pool().submit(self._read, begin, min(PART_BYTES, self.stop - begin))

    def _cut(self, index: int, offset: int, num_bytes: int) -> memoryview:
        begin = self.start + index * PART_BYTES
        data = self._parts[index].result()
        return data[max(0, offset - begin) : offset + num_bytes - begin]

    def close(self) -> None:
        """Forget what was fetched."""
        for part in self._parts.values():
            part.cancel()
        self._parts.clear()
