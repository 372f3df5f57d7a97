"""Runs tasks in a pool of threads or processes on this machine.

Threads suffice for most methods: kernels, digests, reads and writes release the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import replace

from mmerge.manifests.errors import MmergeError
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.execution.signals import uninterrupted
from mmerge.workers.runtime.cores import one_thread
from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.run import run_task

COMMIT_THREADS = 4
"""Files that are committed (synced and renamed) at once, in the driver."""
COMMITS_PER_WORKER = 2
"""Limit for uncommitted results per worker; beyond it no further task starts.

A slow disk must slow the workers down, or uncommitted files would accumulate.
"""


def run_in_threads(
    tasks: Sequence[Task],
    store_uri: str,
    *,
    num_threads: int,
    memory_bytes: int | None,
    follow: Follow = nothing_follows,
) -> Outcomes:
    """Yield each task with its result, or the error that it ended with, as they end.

    Args:
        tasks: begun in their order.
        store_uri: the store that they write to.
        num_threads: tasks at once, one core each.
        memory_bytes: limit for the `peak_bytes` of the tasks at once; one task may exceed it.
        follow: see `run_in_pool`.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-task")
    try:
        # For the whole run: tasks beside each other cannot each set and restore it.
        with one_thread():
            yield from run_in_pool(
                pool,
                tasks,
                store_uri,
                num_workers=num_threads,
                memory_bytes=memory_bytes,
                follow=follow,
            )
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def run_in_pool(
    pool: Executor,
    tasks: Sequence[Task],
    store_uri: str,
    *,
    num_workers: int,
    memory_bytes: int | None,
    worker_bytes: int = 0,
    follow: Follow = nothing_follows,
) -> Outcomes:
    """Yield each task with its result or error, as they end.

    Tasks wait here and not in the pool, so that nothing more begins after an interrupt.

    Args:
        pool: of `num_workers` threads or processes.
        tasks: begun in their order.
        store_uri: the store that they write to.
        num_workers: tasks at once.
        memory_bytes: limit for the memory of the tasks at once; one task may exceed it.
        worker_bytes: memory of a worker beside its task.
        follow: called with each task that has ended with a result; the tasks that it returns begin
            before all that wait.
    """
    waiting = deque(tasks)
    running: dict[Future[TaskResult], Task] = {}
    committing: dict[Future[TaskResult], Task] = {}
    store = open_store(store_uri)
    committers = ThreadPoolExecutor(COMMIT_THREADS, thread_name_prefix="mmerge-commit")

    def start_tasks() -> None:
        while waiting and len(committing) <= COMMITS_PER_WORKER * num_workers:
            if not _fits(waiting[0], running.values(), num_workers, memory_bytes, worker_bytes):
                return
            with uninterrupted():
                task = waiting.popleft()
                running[pool.submit(run_task, task, store_uri, commits=False)] = task

    def start_commits(futures: Iterable[Future[TaskResult]]) -> None:
        with uninterrupted():
            for future in futures:
                committing[committers.submit(_commit, store, future)] = running.pop(future)

    try:
        start_tasks()
        while running or committing:
            done, _ = wait([*running, *committing], return_when=FIRST_COMPLETED)
            ended = []
            for future in done & committing.keys():
                ended.append((committing.pop(future), _outcome(future)))
            start_commits(done & running.keys())
            start_tasks()  # before `follow`, which may read from the store: no worker waits for it
            for task, outcome in ended:
                if isinstance(outcome, TaskResult):
                    waiting.extendleft(reversed(follow(task, outcome)))
                yield task, outcome
            start_tasks()
    finally:
        # On Ctrl-C the running tasks are finished and committed, so that their shards are kept.
        start_commits(list(running))
        committers.shutdown(wait=True)


def _commit(store: Store, future: Future[TaskResult]) -> TaskResult:
    """Return a result once its files are committed; its worker is at the next task by now."""
    result = future.result()
    store.commit(result.deferred_commits)
    return replace(result, deferred_commits=())


def _fits(
    task: Task,
    running: Collection[Task],
    num_workers: int,
    memory_bytes: int | None,
    worker_bytes: int,
) -> bool:
    if len(running) >= num_workers:
        return False
    if not running or memory_bytes is None:
        return True
    needed = sum(other_task.peak_bytes + worker_bytes for other_task in running)
    return needed + task.peak_bytes + worker_bytes <= memory_bytes


def _outcome(future: Future[TaskResult]) -> TaskResult | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, MmergeError):
        return error
    raise error
