"""Compiled work on the threads that torch computes with, its OpenMP team.

Threads of our own would wait: those of torch keep their cores busy for milliseconds after a
product, looking for the next one, and forming a block of weights takes less than one.
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch


class TeamWork(Protocol):
    """Compiled work that any number of threads do together, each taking parts until there are none
    left.
    """

    def take_parts(self) -> None:
        """Do parts, on the thread that calls."""

    @property
    def entry(self) -> int:
        """Address of a C function void(void *) that does the same, given `arguments`."""

    @property
    def arguments(self) -> int:
        """Address of what `entry` is given."""


def work_together(work: TeamWork, *, num_threads: int) -> None:
    """Let so many threads do the work, this one among them: torch's where they are to be had, else
    threads of our own.
    """
    begin = _find_team()
    if begin is not None:
        begin(work.entry, work.arguments, num_threads, 0)
        return
    waiting = [
        _open_threads(num_threads - 1).submit(work.take_parts) for _ in range(num_threads - 1)
    ]
    work.take_parts()
    for future in waiting:
        future.result()


@cache
def _find_team() -> Any:
    """Return `GOMP_parallel(function, argument, threads, flags)` of the OpenMP library that torch
    has loaded; None where it is another's.
    """
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    folder = Path(torch.__file__).parent
    places = [
        *sorted(folder.glob("lib/libgomp*.so*")),
        *sorted(folder.parent.glob("torch.libs/libgomp*.so*")),
        Path("libgomp.so.1"),
    ]
    for place in places:
        with suppress(OSError, AttributeError):
            # Only what is loaded: another copy would have threads of its own.
            begin = ctypes.CDLL(str(place), mode=os.RTLD_NOLOAD | os.RTLD_LAZY).GOMP_parallel
            begin.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            begin.restype = None
            return begin
    return None


@cache
def _open_threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-team")
