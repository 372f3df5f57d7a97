"""Run a command and measure it: wall time, CPU time and peak memory, summed over its processes."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_SECONDS = 0.02


def plain_environment() -> dict[str, str]:
    """Return this process's environment with bytecode caching enabled.

    Without the cache every start compiles all modules again.
    """
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


@dataclass(frozen=True)
class Measured:
    """What a command took."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    """Largest sum of the resident memory of all its processes at one moment; pages of files that
    are mapped count.
    """
    peak_private_bytes: int
    """The same without pages of files."""


def touch_free_memory(num_bytes: int, *, large_pages: bool = False) -> None:
    """Write to `num_bytes` of memory and free it, so that the next run gets backed pages.

    A virtual machine hands memory that is free for some seconds back to its host; the first write
    to it afterwards was seen to take ten times as long, and would be counted as the writing of the
    output. The system gives ordinary and large pages from
    different parts of its memory: with `large_pages` so many bytes of both are touched, at once, so
    that they are different ones.
    """
    memories = [
        mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for _ in range(1 + large_pages)
    ]
    if large_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        memories[0].madvise(mmap.MADV_HUGEPAGE)
    for memory in memories:
        view = np.frombuffer(memory, np.uint8)
        view[:: mmap.PAGESIZE] = 1
        del view
    for memory in reversed(memories):
        memory.close()


def measure(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, log: Path
) -> Measured:
    """Return what a command took. Raises RuntimeError with the end of its output when it fails."""
    before = os.times()
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**plain_environment(), **(environment or {})},
        )
        peaks = [0, 0]
        stop = threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, peaks, stop))
        sampler.start()
        code = process.wait()
        wall = time.monotonic() - began
        stop.set()
        sampler.join()
    after = os.times()
    if code:
        raise RuntimeError(
            f"{' '.join(command)}: exit code {code}\n{log.read_text(errors='replace')[-3000:]}"
        )
    cpu = (
        after.children_user + after.children_system - before.children_user - before.children_system
    )
    return Measured(wall, cpu, peaks[0], peaks[1])


def _sample(pid: int, peaks: list[int], stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_SECONDS):
        resident = private = 0
        for member in descendants(pid):
            sizes = _read_sizes(member)
            resident += sizes.get("VmRSS", 0)
            private += sizes.get("RssAnon", 0) + sizes.get("RssShmem", 0)
        peaks[0], peaks[1] = max(peaks[0], resident), max(peaks[1], private)


def descendants(pid: int) -> list[int]:
    """Return this process and all below it."""
    pids = [pid]
    for parent in pids:
        try:
            for task in Path(f"/proc/{parent}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return pids


def _read_sizes(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (
        line.split(":", 1) for line in lines if line.startswith(("VmRSS", "RssAnon", "RssShmem"))
    )
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}
