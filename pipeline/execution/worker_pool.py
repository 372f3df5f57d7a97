"""Tasks in a pool of this machine; as threads of this process: kernels, digests, reads and writes
all release the interpreter's lock.
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
from mmerge.workers.runtime.lazy_torch import torch_is_loaded
from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.run import run_task

SETTLING_THREADS = 4
"""Files that are waited for at once, in the process that hands out tasks."""
SETTLING_AT_ONCE = 2
"""Tasks per worker whose files may be waited for before no further one begins: a disk that cannot
follow holds the workers.
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
        store_uri: where their results go.
        num_threads: tasks at once.
        memory_bytes: the sum of the `peak_bytes` of the tasks at once; a single task may take more.
        follow: see `run_in_pool`.
    """
    before = _set_torch_threads(1)
    # One core per task, as on a cluster; more would only get in each other's way.
    pool = ThreadPoolExecutor(
        num_threads, thread_name_prefix="mmerge-task", initializer=_set_torch_threads, initargs=(1,)
    )
    try:
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
        if before is not None:
            _set_torch_threads(before)


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
    """Yield each task with its result or error, as they end; the pool never holds a task that has
    not begun.

    Args:
        pool: of `num_workers` threads or processes.
        tasks: begun in their order.
        store_uri: where their results go.
        num_workers: tasks at once.
        memory_bytes: the sum of what the tasks at once take; a single task may take more.
        worker_bytes: what a worker takes beside its task.
        follow: asked for each task that has ended which ones follow from it; they begin before all
            that wait.
    """
    waiting = deque(tasks)
    running: dict[Future[TaskResult], Task] = {}
    settling: dict[Future[TaskResult], Task] = {}
    store = open_store(store_uri)
    settlers = ThreadPoolExecutor(SETTLING_THREADS, thread_name_prefix="mmerge-settle")

    def begin() -> None:
        while waiting and len(settling) <= SETTLING_AT_ONCE * num_workers:
            if not _fits(waiting[0], running.values(), num_workers, memory_bytes, worker_bytes):
                return
            with uninterrupted():
                task = waiting.popleft()
                running[pool.submit(run_task, task, store_uri, settles=False)] = task

    def settle_all(done: Iterable[Future[TaskResult]]) -> None:
        with uninterrupted():
            for future in done:
                settling[settlers.submit(_settle, store, future)] = running.pop(future)

    try:
        begin()
        while running or settling:
            done, _ = wait([*running, *settling], return_when=FIRST_COMPLETED)
            ended = [
                (settling.pop(future), _outcome(future)) for future in done if future in settling
            ]
            settle_all([future for future in done if future in running])
            begin()  # no worker waits for what follows to be found out
            for task, outcome in ended:
                if isinstance(outcome, TaskResult):
                    waiting.extendleft(reversed(follow(task, outcome)))
                yield task, outcome
            begin()
    finally:
        # On Ctrl-C what runs is finished and settled, so that its shards are kept; nothing more is
        # begun.
        settle_all(list(running))
        settlers.shutdown(wait=True)


def _settle(store: Store, future: Future[TaskResult]) -> TaskResult:
    """Return a task's result once what it wrote is on the disk: the worker is at the next task
    meanwhile.
    """
    result = future.result()
    store.commit(result.pending)
    return replace(result, pending=())


def _set_torch_threads(number: int) -> int | None:
    """Let torch use so many threads, and return how many it used before; None where it is not
    loaded.
    """
    if not torch_is_loaded():
        return None
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    return before


def _fits(
    task: Task,
    running: Collection[Task],
    num_workers: int,
    memory_bytes: int | None,
    worker_bytes: int,
) -> bool:
    if len(running) >= num_workers:
        return False
    return (
        not running
        or memory_bytes is None
        or sum(one.peak_bytes + worker_bytes for one in (task, *running)) <= memory_bytes
    )


def _outcome(future: Future[TaskResult]) -> TaskResult | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, MmergeError):
        return error
    raise error
