"""Opens executors by name; the module of an executor is imported when it is opened."""

from __future__ import annotations

from importlib import import_module
from typing import Literal, cast

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.execution.executor import Executor, ExecutorOptions, OpenExecutor

ExecutorName = Literal["ray", "processes", "serial"]

EXECUTORS: dict[str, str] = {
    "ray": "mmerge.pipeline.execution.ray_executor:open_ray",
    "processes": "mmerge.pipeline.execution.process_executor:open_processes",
    "serial": "mmerge.pipeline.execution.executor:open_serial",
}
"""By name, MODULE:FUNCTION of an `OpenExecutor`."""


def open_executor(
    name: ExecutorName,
    *,
    address: str | None = None,
    num_workers: int | None = None,
    memory_bytes: int | None = None,
    peak_bytes: int = 0,
    deadline_seconds: float | None = None,
) -> Executor:
    """Return the executor of that name. Processes start at once, all others with the first task.

    Args:
        name: where tasks run.
        address: of a Ray cluster.
        num_workers: tasks at once on this machine; one per core if absent.
        memory_bytes: limit for all processes of this machine together.
        peak_bytes: memory of the plan's largest task.
        deadline_seconds: limit for one attempt on Ray, after which another one is started
            elsewhere; estimated from the task's size if absent.

    Raises:
        MmergeError: an option has no effect with this executor.
    """
    if address and memory_bytes is not None:
        raise MmergeError(
            "--memory has no effect with --address: a cluster's nodes say themselves what they"
            " offer. Leave one of them out"
        )
    for option, value in (("--address", address), ("--task-deadline", deadline_seconds)):
        if name != "ray" and value is not None:
            raise MmergeError(
                f"{option} has no effect with --executor {name}. Leave one of them out"
            )
    module, _, function = EXECUTORS[name].partition(":")
    open_by_name = cast("OpenExecutor", getattr(import_module(module), function))
    return open_by_name(
        ExecutorOptions(
            address=address,
            num_workers=num_workers,
            memory_bytes=memory_bytes,
            peak_bytes=peak_bytes,
            deadline_seconds=deadline_seconds,
        )
    )
