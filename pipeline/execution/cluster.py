"""The interface between the scheduler and the cluster on which attempts run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from mmerge.workers.task import Task, TaskResult


@dataclass(frozen=True)
class Resources:
    """Resources of one attempt; memory in bytes."""

    num_cpus: float
    num_gpus: float
    memory: int


@dataclass(frozen=True)
class Attempt:
    """One start of a task."""

    task: Task
    number: int
    """1 for the first attempt."""
    resources: Resources
    avoid: frozenset[str] = frozenset()
    """Nodes where an earlier attempt hangs or was lost."""
    prefer: str | None = None
    """The node that has read this shard: its page cache and downloads are warm."""


@dataclass(frozen=True)
class Event:
    """A change of an attempt's state.

    - `started` on `node`.
    - `finished` with a result.
    - `failed` with the task's own error, which another attempt would repeat.
    - `lost`: its process or node died, it ran out of memory, or the store could not be reached;
      another attempt may succeed.
    - `undelivered`: it has not started and may have been sent to a dead node; it is submitted
      again.
    """

    attempt: Attempt
    kind: Literal["started", "finished", "failed", "lost", "undelivered"]
    node: str = ""
    result: TaskResult | None = None
    error: Exception | None = None
    out_of_memory: bool = False


class Cluster(Protocol):
    """Runs attempts. The scheduler calls `start` and `cancel`, and `wait` for events."""

    def now(self) -> float:
        """Return seconds on the cluster's clock."""

    def num_slots(self, resources: Resources) -> int:
        """Return how many attempts of this size the live nodes can run concurrently."""

    def start(self, attempt: Attempt) -> None:
        """Start an attempt, or queue it where no node is free."""

    def wait(self, timeout: float | None) -> list[Event]:
        """Return new events, at least one unless `timeout` seconds pass."""

    def cancel(self, attempt: Attempt) -> None:
        """End an attempt; no further event of it is reported."""
