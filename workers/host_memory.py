"""Memory of the host for weights: in large pages, which cost a fraction of small ones at their first touch."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Literal

import torch

LARGE_PAGE_BYTES = 2 << 20
_MAP_FROM, _TRIM_FROM = -3, -1
"""The parameters M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of `mallopt` (malloc.h)."""
_HEAP_BYTES = 32 << 20
"""The largest M_MMAP_THRESHOLD that the C library chooses by itself."""
_MAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"


def empty_host(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of this shape whose values are not set, aligned to cache lines; of two megabytes or more in large pages."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    # Only whole large pages inside of the mapping can be such: one more than needed, and the start moved to the first.
    mapped = mmap.mmap(-1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    raw = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -raw.data_ptr() % LARGE_PAGE_BYTES
    # A last page that is filled to less than half stays in small ones: what is resident is then near what is held.
    num_large = (num_bytes + LARGE_PAGE_BYTES // 2) // LARGE_PAGE_BYTES
    with suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE, start, min(num_large * LARGE_PAGE_BYTES, num_bytes + LARGE_PAGE_BYTES - start))
    return raw[start : start + num_bytes].view(dtype).reshape(tuple(shape))


@contextmanager
def returned_at_once() -> Iterator[None]:
    """Let memory of a megabyte and more go back to the system as soon as it is freed, while the context lasts.

    The C library maps such memory by itself at first, but takes it from its heaps once some was freed, up to 32 MB, and heaps keep gaps:
    a rank that reads, cuts and gives away matrices held up to a fifth more than it needs. No effect where the library is another,
    or its limit is given in the environment.
    """
    setter = None if _MAP_VARIABLE in os.environ else getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if setter is None:
        yield
        return
    setter(_MAP_FROM, 1 << 20)
    try:
        yield
    finally:
        # What the library itself arrives at after large blocks were freed: afterwards the model's own results are to be reused.
        setter(_MAP_FROM, _HEAP_BYTES)
        setter(_TRIM_FROM, 2 * _HEAP_BYTES)


def resident_bytes(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the memory of this process that is resident, or was at most (VmHWM), in bytes; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    return 0
