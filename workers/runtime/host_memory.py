"""Host memory: tensors in huge pages, and the resident memory of this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

HUGE_BYTES = 4 << 20
"""From this size on NumPy asks for huge pages (MADV_HUGEPAGE), and torch does not."""
LINE_BYTES = 64


def empty_tensor(shape: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor on the CPU, aligned to cache lines.

    A large one is allocated by NumPy, in huge pages where the system allows them: faulting in the
    small pages of `torch.empty` takes about a fifth of the CPU time of loading a model.
    """
    import torch

    num_bytes = prod(shape) * dtype.itemsize
    if num_bytes < HUGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype)
    memory = np.empty(num_bytes + LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    values = torch.from_numpy(memory[start : start + num_bytes])
    return values.view(dtype).reshape(tuple(shape))


def resident_bytes(which: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the resident memory of this process now (VmRSS) or at its peak (VmHWM), in bytes.

    0 where the system does not say.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    return 0
