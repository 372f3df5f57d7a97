"""The one file that wraps functions as Ray tasks."""

from __future__ import annotations

import ray
import torch

from mmerge.workers.run_task import run_task
from mmerge.workers.task import Task, TaskResult


@ray.remote  # type: ignore[untyped-decorator]  # ray is taken as Any
def run_task_remote(task: Task, store_uri: str) -> TaskResult:
    """Run one task in a Ray worker, one thread: Ray places one task per core."""
    torch.set_num_threads(1)
    return run_task(task, store_uri)
