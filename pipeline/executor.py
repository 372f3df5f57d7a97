"""Executors run tasks: in this process, or on a Ray cluster. They behave alike. The one file that talks to the cluster."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, Protocol

from typing_extensions import override

from mmerge.manifests.errors import MmergeError, StoreError
from mmerge.pipeline.memory import PROCESS_BYTES
from mmerge.pipeline.threads import num_cores, run_in_threads
from mmerge.workers.task import Task, TaskResult

ExecutorName = Literal["serial", "ray"]
Outcome = tuple[Task, TaskResult | Exception]


class Executor(Protocol):
    """Runs tasks whose only effect is on the store."""

    def run(self, tasks: Sequence[Task], store_uri: str) -> Iterator[Outcome]:
        """Yield each task with its result, or the error that it ended with, as they end."""

    def close(self) -> None:
        """End what the executor started."""


class SerialExecutor(Executor):
    """Runs tasks in this process, one thread per core."""

    def __init__(self, *, num_threads: int | None = None, memory_bytes: int | None = None) -> None:
        self.num_threads = num_threads or num_cores()
        self.memory_bytes = memory_bytes

    @override
    def run(self, tasks: Sequence[Task], store_uri: str) -> Iterator[Outcome]:
        yield from run_in_threads(tasks, store_uri, num_threads=self.num_threads, memory_bytes=self.memory_bytes)

    @override
    def close(self) -> None:
        return None


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster: the one at `address`, or a local one that it starts and ends."""

    def __init__(self, *, address: str | None = None, num_workers: int | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.num_workers = num_workers
        self._started = False

    @override
    def run(self, tasks: Sequence[Task], store_uri: str) -> Iterator[Outcome]:
        if not tasks:
            return
        if store_uri.startswith("memory://"):
            raise StoreError(f"{store_uri}: other processes cannot see it. Use --executor serial, or another 'output'")
        self._start()
        self._check_memory(tasks)
        yield from self._drain(deque(tasks), store_uri)

    def _drain(self, waiting: deque[Task], store_uri: str) -> Iterator[Outcome]:
        import ray

        from mmerge.workers.ray_tasks import run_task_remote

        in_flight: dict[Any, Task] = {}
        try:
            while waiting or in_flight:
                while waiting and len(in_flight) < self._window():
                    task = waiting.popleft()
                    remote = run_task_remote.options(num_cpus=1, memory=task.peak_bytes, scheduling_strategy="SPREAD", max_retries=3)
                    in_flight[remote.remote(task, store_uri)] = task
                done, _ = ray.wait(list(in_flight), num_returns=1)
                for reference in done:
                    yield in_flight.pop(reference), _fetch(reference)
        finally:
            # Reached with tasks in flight only on an error or Ctrl-C: leave no orphan behind.
            for reference in in_flight:
                with suppress(Exception):
                    ray.cancel(reference, force=True)

    def _window(self) -> int:
        import ray

        return 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def _start(self) -> None:
        if self._started:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        if not ray.is_initialized():
            try:
                if self.address:
                    ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
                else:
                    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
                    # "local": without it Ray would join whatever cluster was last started on this machine.
                    ray.init(
                        address="local",
                        num_cpus=self.num_workers,
                        include_dashboard=False,
                        logging_level=logging.ERROR,
                        log_to_driver=False,
                    )
            except (ConnectionError, RuntimeError, ValueError, OSError) as error:
                where = self.address or "a local Ray"
                first = str(error).strip().splitlines()[0]
                raise MmergeError(f"{where}: cannot be reached ({first}). Check --address, or run with --executor serial") from error
            self._started = True

    def _check_memory(self, tasks: Sequence[Task]) -> None:
        import ray

        largest = max(tasks, key=lambda task: task.peak_bytes)
        available = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if largest.peak_bytes > available:
            raise MmergeError(
                f"shard {largest.shard} needs {largest.peak_bytes / 1e9:.1f} GB, the largest node offers {available / 1e9:.1f} GB. "
                "Use larger nodes, or a smaller --block-entries"
            )

    @override
    def close(self) -> None:
        if self._started:
            import ray

            ray.shutdown()
            self._started = False


def _fetch(reference: Any) -> TaskResult | Exception:
    import ray

    try:
        result: TaskResult = ray.get(reference)
        return result
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, MmergeError) else MmergeError(f"a task failed with {type(cause).__name__}: {cause}")
    except ray.exceptions.RayError as error:
        return MmergeError(f"a task was lost: {str(error).strip().splitlines()[0]}. Run the same command again: finished shards are kept")


def open_executor(
    name: ExecutorName, *, address: str | None = None, num_workers: int | None = None, memory_bytes: int | None = None, peak_bytes: int = 0
) -> Executor:
    """Return the executor of that name; nothing is started before it has a task.

    Args:
        name: where tasks run.
        address: of a Ray cluster.
        num_workers: tasks at once on this machine.
        memory_bytes: what all processes of this machine together may take.
        peak_bytes: of the plan's largest task.
    """
    if address and memory_bytes is not None:
        raise MmergeError("--memory has no effect with --address: a cluster's nodes say themselves what they offer. Leave one of them out")
    if name == "serial":
        if address:
            raise MmergeError("--address has no effect with --executor serial. Leave one of them out")
        return SerialExecutor(num_threads=num_workers, memory_bytes=None if memory_bytes is None else memory_bytes - PROCESS_BYTES)
    if memory_bytes is not None:
        num_workers = min(num_workers or num_cores(), max(memory_bytes // (PROCESS_BYTES + peak_bytes), 1))
    return RayExecutor(address=address, num_workers=num_workers)
