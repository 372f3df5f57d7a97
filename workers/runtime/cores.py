"""Cores of a machine, and threads of a task: one, so that results do not depend on how many cores
there are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mmerge.workers.runtime.lazy_torch import torch_is_loaded


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
