"""Tasks as threads of this process: kernels, digests, reads and writes all release the interpreter's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from mmerge.manifests.errors import MmergeError
from mmerge.workers.lazy_torch import torch_is_loaded
from mmerge.workers.run_task import run_task
from mmerge.workers.task import Task, TaskResult


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_in_threads(
    tasks: Sequence[Task], store_uri: str, *, num_threads: int, memory_bytes: int | None
) -> Iterator[tuple[Task, TaskResult | Exception]]:
    """Yield each task with its result, or the error that it ended with, as they end.

    Args:
        tasks: begun in their order.
        store_uri: where their results go.
        num_threads: tasks at once.
        memory_bytes: the sum of the `peak_bytes` of the tasks at once; a single task may take more.
    """
    before = _set_torch_threads(1)
    waiting = deque(tasks)
    running: dict[Future[TaskResult], Task] = {}
    # One core per task, as on a cluster; more would only get in each other's way.
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-task", initializer=_set_torch_threads, initargs=(1,))
    try:
        while waiting or running:
            while waiting and _fits(waiting[0], running.values(), num_threads, memory_bytes):
                task = waiting.popleft()
                running[pool.submit(run_task, task, store_uri)] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), _outcome(future)
    finally:
        # On Ctrl-C what runs is finished, so that its shards are kept; nothing more is begun.
        pool.shutdown(wait=True, cancel_futures=True)
        if before is not None:
            _set_torch_threads(before)


def _set_torch_threads(number: int) -> int | None:
    """Let torch use so many threads, and return how many it used before; None where it is not loaded."""
    if not torch_is_loaded():
        return None
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    return before


def _fits(task: Task, running: Collection[Task], num_threads: int, memory_bytes: int | None) -> bool:
    others = list(running)
    if len(others) >= num_threads:
        return False
    return not others or memory_bytes is None or task.peak_bytes + sum(other.peak_bytes for other in others) <= memory_bytes


def _outcome(future: Future[TaskResult]) -> TaskResult | Exception:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, MmergeError):
        return error
    raise error
