"""Random numbers of sampling: seeded, equal on all ranks, and drawn by one generation at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch

_random_turn = RLock()
"""Held while random numbers are drawn: torch's generator is shared by the process."""


@contextmanager
def seeded(
    seed: int | None,
    *,
    samples: bool,
    device: torch.device,
    share: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """Draw the same random numbers on all ranks; restore the generator's state afterwards.

    Composites in other threads draw none meanwhile.

    Args:
        seed: of the numbers; None for others each time.
        samples: whether any are drawn; without them and without a seed nothing is done.
        device: that they are drawn on.
        share: returns an object of rank 0 on every rank; None where there is one rank.
    """
    if seed is None and not samples:
        yield
        return
    with _random_turn:
        if seed is None and share is None:
            yield
            return
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        if share is not None:
            seed = int(share(seed, source=0))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
