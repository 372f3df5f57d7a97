"""Cores of this process, and the number of torch threads of a task."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mmerge.workers.runtime.lazy_torch import torch_is_loaded


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside: how a sum is divided over threads decides its last bits."""
    if not torch_is_loaded():
        yield  # it starts with one thread when it is imported
        return
    import torch

    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield  # nothing to restore: other tasks may run in threads of the same process
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
