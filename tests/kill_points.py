"""A run in a forked process that kills itself at a chosen wait for the disk.

Kill points are exact, and forking avoids the start-up.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.context import ForkServerProcess
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "mmerge.pipeline.build.run",
        "mmerge.pipeline.planning.plan",
        "mmerge.pipeline.recipes.recipe",
        "mmerge.workers.tasks.merge",
    ]
)


def count_waits(recipe: str) -> int:
    """Return how often an undisturbed run waits for the disk."""
    num_waits = _context.Value("i", 0)
    _start(recipe, 0, num_waits).join()
    return num_waits.value


def run_until(recipe: str, kill_at: int) -> int:
    """Return the exit code of a run that kills itself (SIGKILL) at its wait number `kill_at`."""
    num_waits = _context.Value("i", 0)  # must live until the process has opened it
    process = _start(recipe, kill_at, num_waits)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def _start(recipe: str, kill_at: int, num_waits: Any) -> ForkServerProcess:
    process = _context.Process(target=_run, args=(recipe, kill_at, num_waits))
    process.start()
    return process


def _run(recipe: str, kill_at: int, num_waits: Any) -> None:
    import mmerge.manifests.stores.local_writer as local_writer
    from mmerge.pipeline import make_plan, read_recipe, run

    class CountingOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, handle: int) -> None:
            num_waits.value += 1
            if num_waits.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    local_writer.os = CountingOs()  # type: ignore[attr-defined]
    run(make_plan(read_recipe(recipe)))
