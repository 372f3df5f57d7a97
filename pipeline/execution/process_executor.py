"""Runs tasks in a process pool, one worker per core: no contention on the GIL and on mmap_lock."""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

from typing_extensions import override

from mmerge.manifests.errors import MmergeError, StoreError
from mmerge.manifests.stores.open import was_any_opened
from mmerge.pipeline.execution.executor import Executor, ExecutorOptions
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.execution.worker_pool import run_in_pool
from mmerge.pipeline.planning.memory_bounds import PROCESS_BYTES
from mmerge.workers.runtime.cores import num_cores
from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.worker_startup import load_kernels, start_worker


class ProcessExecutor(Executor):
    """Runs tasks in processes of this machine, which start at once and end with `close`.

    On Linux they are forked, provided that no store has been opened: the store library's threads
    would not exist in a forked process. Elsewhere they are spawned, which takes about a second, and
    the main module must guard its own start (`if __name__ == "__main__"`).
    """

    def __init__(
        self, *, num_processes: int | None = None, memory_bytes: int | None = None
    ) -> None:
        """Start the processes; `memory_bytes` limits all of them together."""
        self.num_processes = num_processes or num_cores()
        self.memory_bytes = memory_bytes
        method = "fork" if sys.platform == "linux" and not was_any_opened() else "spawn"
        if method == "fork":
            load_kernels()  # once, for all of them
        self._pool = ProcessPoolExecutor(
            self.num_processes,
            mp_context=multiprocessing.get_context(method),
            initializer=start_worker,
        )
        if method == "fork":
            with warnings.catch_warnings():
                # Python warns of other threads. They are those of linear algebra libraries, which
                # prepare for a fork themselves.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pool.submit(int)  # forks all processes, before the pool starts a thread

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        """Yield each task with its result, or the error that it ended with, as they end.

        Raises:
            StoreError: the store is in this process's memory.
            MmergeError: a process was killed; finished shards are kept.
        """
        if tasks and store_uri.startswith("memory://"):
            raise StoreError(
                f"{store_uri}: other processes cannot see it. Use --executor serial, or another"
                " 'output'"
            )
        unfinished = [task.shard for task in tasks]

        def follow_and_note(task: Task, result: TaskResult) -> Sequence[Task]:
            followers = follow(task, result)
            unfinished[:0] = [follower.shard for follower in followers]
            return followers

        pool_outcomes = run_in_pool(
            self._pool,
            tasks,
            store_uri,
            num_workers=self.num_processes,
            memory_bytes=self.memory_bytes,
            worker_bytes=PROCESS_BYTES,
            follow=follow_and_note,
        )
        try:
            with closing(pool_outcomes) as outcomes:
                for task, outcome in outcomes:
                    unfinished.remove(task.shard)
                    yield task, outcome
        except BrokenProcessPool as error:
            shards = ", ".join(unfinished[: self.num_processes])
            raise MmergeError(
                "a worker process was killed, perhaps because memory ran out, while it worked on"
                f" one of these shards: {shards}. Finished shards are kept: run again, with fewer"
                " --workers or a smaller --memory"
            ) from error

    @override
    def close(self) -> None:
        """End the processes; tasks that have begun are finished first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def open_processes(options: ExecutorOptions) -> ProcessExecutor:
    """Return an executor in processes of this machine."""
    return ProcessExecutor(num_processes=options.num_workers, memory_bytes=options.memory_bytes)
