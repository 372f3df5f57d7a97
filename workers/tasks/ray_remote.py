"""The one file that wraps functions as Ray tasks."""

from __future__ import annotations

from collections.abc import Iterator

import ray
import torch

from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.run import run_task


@ray.remote(num_returns="streaming", max_retries=0)  # type: ignore[untyped-decorator]
def run_task_remote(task: Task, store_uri: str) -> Iterator[str | TaskResult]:
    """Yield the node's id when the task begins, then its result. One thread: Ray places one task
    per core.

    Ray itself repeats nothing: the driver knows of every attempt, and decides on another one.
    """
    torch.set_num_threads(1)
    yield ray.get_runtime_context().get_node_id()
    yield run_task(task, store_uri)
