"""Tasks as processes of this command, one per core: threads wait for each other at the
interpreter's lock and at the map of memory they share.
"""

from __future__ import annotations

import multiprocessing
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing

from mmerge.manifests.errors import MmergeError, StoreError
from mmerge.manifests.stores.open import was_any_opened
from mmerge.pipeline.execution.executor import Executor, ExecutorOptions
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.execution.worker_pool import run_in_pool
from mmerge.pipeline.planning.memory_bounds import PROCESS_BYTES
from mmerge.workers.runtime.cores import num_cores
from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.worker_startup import begin_process


class ProcessExecutor(Executor):
    """Runs tasks in processes of this machine, which begin at once and end with `close`.

    They are forked on Linux as long as no store was opened: a forked process has none of the
    threads that the library behind stores begins. Elsewhere they are started anew, which takes
    about a second, and the program's main module must guard its own start (`if __name__ ==
    "__main__"`).
    """

    def __init__(
        self, *, num_processes: int | None = None, memory_bytes: int | None = None
    ) -> None:
        self.num_processes = num_processes or num_cores()
        self.memory_bytes = memory_bytes
        method = "fork" if sys.platform == "linux" and not was_any_opened() else "spawn"
        self._pool = ProcessPoolExecutor(
            self.num_processes,
            mp_context=multiprocessing.get_context(method),
            initializer=begin_process,
        )
        if method == "fork":
            with warnings.catch_warnings():
                # The threads that Python warns of are those of linear algebra, which prepare for a
                # fork themselves.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pool.submit(int)  # forks all of them, before the pool has a thread

    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        """Yield each task with its result, or the error that it ended with, as they end, those that
        follow from others included.

        Raises:
            MmergeError: a process was killed; what others finished is kept.
        """
        if tasks and store_uri.startswith("memory://"):
            raise StoreError(
                f"{store_uri}: other processes cannot see it. Use --executor serial, or another"
                " 'output'"
            )
        waiting = [task.shard for task in tasks]

        def follow_and_note(task: Task, result: TaskResult) -> Sequence[Task]:
            found = follow(task, result)
            waiting[:0] = [one.shard for one in found]
            return found

        try:
            found = run_in_pool(
                self._pool,
                tasks,
                store_uri,
                num_workers=self.num_processes,
                memory_bytes=self.memory_bytes,
                worker_bytes=PROCESS_BYTES,
                follow=follow_and_note,
            )
            with closing(found) as outcomes:
                for task, outcome in outcomes:
                    waiting.remove(task.shard)
                    yield task, outcome
        except BrokenProcessPool as error:
            shards = ", ".join(waiting[: self.num_processes])
            raise MmergeError(
                "a worker process was killed, perhaps for want of memory, while it worked on one"
                f" of these shards: {shards}. Finished shards are kept: run again, with fewer"
                " --workers or a smaller --memory"
            ) from error

    def close(self) -> None:
        """End the processes; what they are at work on is finished first."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def open_processes(options: ExecutorOptions) -> ProcessExecutor:
    """Return an executor in processes of this machine."""
    return ProcessExecutor(num_processes=options.num_workers, memory_bytes=options.memory_bytes)
