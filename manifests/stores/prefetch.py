"""Reads over a network: large ranges in parallel parts, and prefetch for a sequential reader."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray

PART_BYTES = 8 << 20
"""Bytes of one request; a larger range is read in several at once."""
CHUNK_BYTES = 1 << 20
"""Bytes of a part that are copied out as they arrive; otherwise the library holds the whole part,
and copies it at its end.
"""
RANGE_PARTS = 4
"""Parts of one range that are requested at once. With more, all of them arrive at the end, and a
digest has nothing to do meanwhile.
"""
NUM_REQUESTS = 6
"""Ranged requests at once, per process."""
PREFETCH_PARTS = 2
"""Parts that are fetched before a sequential reader needs them, for each object it reads."""
PREFETCH_BYTES = (PREFETCH_PARTS + 1) * PART_BYTES
"""The most that is held for one object that is read sequentially."""

ReadRange = Callable[[int, int], memoryview]
"""Returns the bytes of (offset, num_bytes) of one object, in one request."""
ReadInto = Callable[[int, NDArray[np.uint8]], None]
"""Fills an array with the bytes of one object from an offset on, in one request."""


@cache
def _pool() -> ThreadPoolExecutor:
    # The library releases the GIL while it waits, so threads are enough.
    return ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="mmerge-read")


# A forked process has the pool but none of its threads: it would wait for them forever.
os.register_at_fork(after_in_child=_pool.cache_clear)


def read_in_parts(
    read: ReadInto, offset: int, num_bytes: int, *, on_part: Callable[[memoryview], object]
) -> memoryview:
    """Return a range of an object, read in parts of 8 MiB, several at once.

    `on_part` receives each part in order, while the next ones are on their way.
    """
    whole = np.empty(num_bytes, np.uint8)
    view = whole.data.toreadonly()
    pending: deque[tuple[int, Future[None]]] = deque()
    starts = iter(range(0, num_bytes, PART_BYTES))
    try:
        while True:
            for start in itertools.islice(starts, RANGE_PARTS - len(pending)):
                part = whole[start : start + PART_BYTES]
                pending.append((start, _pool().submit(read, offset + start, part)))
            if not pending:
                return view
            start, request = pending.popleft()
            request.result()
            on_part(view[start : start + PART_BYTES])
    finally:
        for _, request in pending:
            request.cancel()


class ForwardReader:
    """Reads one range of an object sequentially, with the next parts on their way.

    Not thread-safe.
    """

    def __init__(self, read: ReadRange, *, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._read = read
        self._parts: dict[int, Future[memoryview]] = {}
        """Requested parts by their index."""

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return bytes of the range; parts before `offset`, and far behind it, are dropped."""
        first = (offset - self.start) // PART_BYTES
        last = (offset + num_bytes - 1 - self.start) // PART_BYTES
        needed = range(first, last + 1 + PREFETCH_PARTS)
        for index in [index for index in self._parts if index not in needed]:
            self._parts.pop(index).cancel()
        for index in needed:
            self._request(index)
        pieces = [self._cut(index, offset, num_bytes) for index in range(first, last + 1)]
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _request(self, index: int) -> None:
        begin = self.start + index * PART_BYTES
        if index not in self._parts and begin < self.stop:
            num_bytes = min(PART_BYTES, self.stop - begin)
            self._parts[index] = _pool().submit(self._read, begin, num_bytes)

    def _cut(self, index: int, offset: int, num_bytes: int) -> memoryview:
        """Wait for a part, and return what it has of bytes `offset` to `offset + num_bytes`."""
        begin = self.start + index * PART_BYTES
        data = self._parts[index].result()
        return data[max(0, offset - begin) : offset + num_bytes - begin]

    def close(self) -> None:
        """Drop all parts."""
        for part in self._parts.values():
            part.cancel()
        self._parts.clear()
