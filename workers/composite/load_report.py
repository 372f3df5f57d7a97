"""What a load of a composite read and took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadReport:
    """What one rank read from the store, how long its load took, and the memory of its process."""

    rank: int
    bytes_read: int
    seconds: float
    start_bytes: int = 0
    """Resident memory before the first weight was read: Python, torch, transformers, kernels.

    0 where the system does not say.
    """
    peak_bytes: int = 0
    """Peak of the resident memory until the model was loaded (VmHWM)."""
