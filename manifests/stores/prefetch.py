"""Reading over a network: ranges in parallel parts, and ahead of a reader that goes on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
from numpy.typing import NDArray

PART_BYTES = 8 << 20
"""Bytes of one request; a range of more is read as several at once."""
CHUNK_BYTES = 1 << 20
"""Bytes of a part that are taken over at once, as they arrive: the library would hold the part, and
then copy it together.
"""
RANGE_PARTS = 4
"""Parts of one range that are on their way at once. More, and all would arrive at the end, with
nothing to digest meanwhile.
"""
NUM_PARTS = 6
"""Ranged requests on their way at once, per process."""
AHEAD_PARTS = 2
"""Parts that are fetched ahead of a sequential reader, for each file it reads."""
AHEAD_BYTES = (AHEAD_PARTS + 1) * PART_BYTES
"""The most that is held for one file that is read forward."""

ReadRange = Callable[[int, int], memoryview]
"""Reads (offset, num_bytes) of one object in one request."""
ReadInto = Callable[[int, NDArray[np.uint8]], None]
"""Reads from an offset of one object, in one request, as many bytes as the array takes."""
OnPart = Callable[[memoryview], object]
"""Told of the bytes of a range in their order; for example the `update` of a digest."""


@cache
def _pool() -> ThreadPoolExecutor:
    # The library leaves Python's lock while it waits, so threads are enough.
    return ThreadPoolExecutor(NUM_PARTS, thread_name_prefix="mmerge-read")


def read_in_parts(read: ReadInto, offset: int, num_bytes: int, *, on_part: OnPart) -> memoryview:
    """Return a range of an object, read in parts of 8 MiB, several at once; `on_part` is told of
    each while the next are on their way.
    """
    whole = np.empty(num_bytes, np.uint8)
    view = whole.data.toreadonly()
    waiting: deque[tuple[int, Future[None]]] = deque()
    starts = iter(range(0, num_bytes, PART_BYTES))
    try:
        while True:
            for start in itertools.islice(starts, RANGE_PARTS - len(waiting)):
                waiting.append(
                    (start, _pool().submit(read, offset + start, whole[start : start + PART_BYTES]))
                )
            if not waiting:
                return view
            start, part = waiting.popleft()
            part.result()
            on_part(view[start : start + PART_BYTES])
    finally:
        for _, part in waiting:
            part.cancel()


class ForwardReader:
    """Reads one range of an object piece by piece, forward, with the next parts on their way. Not
    for several threads.
    """

    def __init__(self, read: ReadRange, *, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        self._read = read
        self._parts: dict[int, Future[memoryview]] = {}

    def read(self, offset: int, num_bytes: int) -> memoryview:
        """Return bytes of the range; parts before `offset`, and far behind it, are forgotten."""
        first, last = (
            (offset - self.start) // PART_BYTES,
            (offset + num_bytes - 1 - self.start) // PART_BYTES,
        )
        for index in [index for index in self._parts if not first <= index <= last + AHEAD_PARTS]:
            self._parts.pop(index).cancel()
        for index in range(first, last + 1 + AHEAD_PARTS):
            self._fetch(index)
        pieces = [self._cut(index, offset, num_bytes) for index in range(first, last + 1)]
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _fetch(self, index: int) -> None:
        begin = self.start + index * PART_BYTES
        if index not in self._parts and begin < self.stop:
            self._parts[index] = _pool().submit(
                self._read, begin, min(PART_BYTES, self.stop - begin)
            )

    def _cut(self, index: int, offset: int, num_bytes: int) -> memoryview:
        begin = self.start + index * PART_BYTES
        data = self._parts[index].result()
        return data[max(0, offset - begin) : offset + num_bytes - begin]

    def close(self) -> None:
        """Forget what was fetched."""
        for part in self._parts.values():
            part.cancel()
        self._parts.clear()
