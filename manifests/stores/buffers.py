"""Reusable buffers in large pages.

Memory that is touched for the first time costs more than the copy into it: reading into small pages
was measured to take three times as long where they do not fit the caches.
"""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

LARGE_PAGE_BYTES = 2 << 20


class BufferPool:
    """Keeps released buffers for the next caller, at most `max_free` of them. Thread-safe."""

    def __init__(self, *, max_free: int) -> None:
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=max_free)

    def acquire(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return a buffer of at least `num_bytes` bytes, uint8, that begins at a page."""
        with suppress(IndexError):
            buffer = self._free.pop()
            if len(buffer) >= num_bytes:
                return buffer
        return _allocate(num_bytes)

    def release(self, buffer: NDArray[np.uint8]) -> None:
        """Take back a buffer that nothing refers to any more."""
        self._free.append(buffer)


def _allocate(num_bytes: int) -> NDArray[np.uint8]:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    num_bytes = -(-num_bytes // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
    # Private: shared memory gets no large pages. One page more, to begin at a large page.
    memory = mmap.mmap(
        -1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = np.frombuffer(memory, np.uint8)
    start = -buffer.ctypes.data % LARGE_PAGE_BYTES
    return buffer[start : start + num_bytes]
