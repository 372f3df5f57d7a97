"""Memory of the host for weights: in large pages, which cost a fraction of small ones at their
first touch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from threading import Lock
from typing import Literal

import torch

LARGE_PAGE_BYTES = 2 << 20
REGION_BYTES = 64 << 20
"""Of address space that `SharedPages` takes at once; what nothing was written to takes no memory.
"""
_SHARED_BYTES = REGION_BYTES // 8
"""Larger tensors fill pages of their own well enough."""
_LINE_BYTES = 64
_MAP_FROM, _TRIM_FROM = -3, -1
"""The parameters M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of `mallopt` (malloc.h)."""
_HEAP_BYTES = 32 << 20
"""The largest M_MMAP_THRESHOLD that the C library chooses by itself."""
_MAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"


Empty = Callable[[Sequence[int], torch.dtype], torch.Tensor]
"""Where memory for a tensor comes from: returns one whose values are not set."""


def empty_host(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of this shape whose values are not set, aligned to cache lines; of two
    megabytes or more in large pages.
    """
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    # A last page that is filled to less than half stays in small ones: what is resident is then
    # near what is held.
    num_large = (num_bytes + LARGE_PAGE_BYTES // 2) // LARGE_PAGE_BYTES
    return _Mapping(num_bytes, large_bytes=num_large * LARGE_PAGE_BYTES).take(0, shape, dtype)


class SharedPages:
    """Memory in large pages that tensors share: for those that are kept together, as the weights of
    a model are.

    It goes back to the system in regions, each when the last of its tensors is gone: what is soon
    dropped does not belong here. Threads may use one at the same time.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._region: _Mapping | None = None
        self._start = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of this shape whose values are not set, aligned to cache lines; a large
        one from `empty_host`.
        """
        num_bytes = prod(shape) * dtype.itemsize
        if not 0 < num_bytes <= _SHARED_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
            return empty_host(shape, dtype)
        with self._lock:
            if self._region is None or self._start + num_bytes > REGION_BYTES:
                self._region, self._start = _Mapping(REGION_BYTES, large_bytes=REGION_BYTES), 0
            region, start = self._region, self._start
            self._start += -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
        return region.take(start, shape, dtype)


class _Mapping:
    """Memory mapped by itself, private (shared memory gets no large pages), from a large page on."""

    def __init__(self, num_bytes: int, *, large_bytes: int) -> None:
        """Map `num_bytes`, the first `large_bytes` of them in large pages where the system has
        such.
        """
        # Only whole large pages inside of the mapping can be such: one more than needed, and the
        # start moved to the first.
        self._mapped = mmap.mmap(
            -1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._start = (
            -torch.frombuffer(self._mapped, dtype=torch.uint8, count=1).data_ptr()
            % LARGE_PAGE_BYTES
        )
        with suppress(OSError):
            self._mapped.madvise(
                mmap.MADV_HUGEPAGE,
                self._start,
                min(large_bytes, num_bytes + LARGE_PAGE_BYTES - self._start),
            )

    def take(self, start: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor, not empty, that lies from byte `start` on; it keeps the mapping, and its
        storage is only its own bytes.
        """
        return torch.frombuffer(
            self._mapped, dtype=dtype, count=prod(shape), offset=self._start + start
        ).reshape(tuple(shape))


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Let memory of a megabyte and more go back to the system as soon as it is freed, while the
    context lasts.

    The C library maps such memory by itself at first, but takes it from its heaps once some was
    freed, up to 32 MB, and heaps keep gaps: a rank that reads, cuts and gives away matrices held up
    to a fifth more than it needs. No effect where the library is another, or its limit is given in
    the environment.
    """
    setter = (
        None
        if _MAP_VARIABLE in os.environ
        else getattr(ctypes.CDLL(None), "mallopt", None)
        if os.name == "posix"
        else None
    )
    if setter is None:
        yield
        return
    setter(_MAP_FROM, 1 << 20)
    try:
        yield
    finally:
        # What the library itself arrives at after large blocks were freed: afterwards the model's
        # own results are to be reused.
        setter(_MAP_FROM, _HEAP_BYTES)
        setter(_TRIM_FROM, 2 * _HEAP_BYTES)


def resident_bytes(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the memory of this process that is resident, or was at most (VmHWM), in bytes; 0 where
    the system does not say.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    return 0
