"""Memory of the host for weights: in large pages, which cost a fraction of small ones at their first touch."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Literal

import torch

LARGE_PAGE_BYTES = 2 << 20


def empty_host(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of this shape whose values are not set, aligned to cache lines; of some megabytes or more in large pages."""
    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < 2 * LARGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    # Only whole large pages inside of the mapping can be such: one more than needed, and the start moved to the first.
    mapped = mmap.mmap(-1, num_bytes + LARGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -raw.data_ptr() % LARGE_PAGE_BYTES
    return raw[start : start + num_bytes].view(dtype).reshape(tuple(shape))


def resident_bytes(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the memory of this process that is resident, or was at most (VmHWM), in bytes; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    return 0
