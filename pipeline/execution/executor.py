"""Executors run tasks whose only effect is on the store; they behave alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from typing_extensions import override

from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.execution.worker_pool import run_in_threads
from mmerge.pipeline.planning.memory_bounds import PROCESS_BYTES
from mmerge.workers.runtime.cores import num_cores
from mmerge.workers.task import Task


class Executor(Protocol):
    """Runs tasks whose only effect is on the store.

    Order of calls, by the driver:

    1. `run`, whose outcomes it consumes; it closes them if it stops early;
    2. `run` again, any number of times, never two at once;
    3. `close`.
    """

    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        """Yield each task with its result, or the error that it ended with, as they end.

        Args:
            tasks: begun in their order.
            store_uri: the store that they write to.
            follow: called in the driver's thread with each task that has ended with a result,
                before that is yielded. It returns the tasks that follow: they begin before those
                that wait, while their inputs are in the page cache.
        """

    def close(self) -> None:
        """End the processes or connections of the executor."""


@dataclass(frozen=True)
class ExecutorOptions:
    """What a user may say about where tasks run; see `open_executor`."""

    address: str | None = None
    num_workers: int | None = None
    memory_bytes: int | None = None
    peak_bytes: int = 0
    deadline_seconds: float | None = None


OpenExecutor = Callable[[ExecutorOptions], Executor]


class SerialExecutor(Executor):
    """Runs tasks in this process, one thread per core."""

    def __init__(self, *, num_threads: int | None = None, memory_bytes: int | None = None) -> None:
        """Take the number of tasks at once, and the sum of their `peak_bytes`."""
        self.num_threads = num_threads or num_cores()
        self.memory_bytes = memory_bytes

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        yield from run_in_threads(
            tasks,
            store_uri,
            num_threads=self.num_threads,
            memory_bytes=self.memory_bytes,
            follow=follow,
        )

    @override
    def close(self) -> None:
        return None


def open_serial(options: ExecutorOptions) -> SerialExecutor:
    """Return an executor in this process; its memory limit includes the process itself."""
    memory_bytes = options.memory_bytes
    if memory_bytes is not None:
        memory_bytes -= PROCESS_BYTES
    return SerialExecutor(num_threads=options.num_workers, memory_bytes=memory_bytes)
