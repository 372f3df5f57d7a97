"""Threads of a task: one, so that results do not depend on how many cores a machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmerge.workers.lazy_torch import torch_is_loaded


@contextmanager
def one_thread() -> Iterator[None]:
    """Run inside with one thread of torch: how a sum is split over threads decides its last bits."""
    if not torch_is_loaded():
        yield  # it will begin with one thread
        return
    before = torch.get_num_threads()
    if before == 1:
        yield  # nothing to undo: tasks beside this one may run in threads of the same process
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
