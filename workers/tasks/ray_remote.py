"""The task runner as a Ray remote function: all that Ray imports on a worker."""

from __future__ import annotations

from collections.abc import Iterator

import ray

from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.run import run_task


@ray.remote(num_returns="streaming", max_retries=0)  # type: ignore[untyped-decorator]
def run_task_remote(task: Task, store_uri: str) -> Iterator[str | TaskResult]:
    """Yield the node's id when the task begins, then its result.

    Ray itself retries nothing: the driver knows of every attempt, and decides on another one.
    """
    # Ray places one task per core. Imported here: the driver only names this function.
    import torch

    torch.set_num_threads(1)
    yield ray.get_runtime_context().get_node_id()
    yield run_task(task, store_uri)
