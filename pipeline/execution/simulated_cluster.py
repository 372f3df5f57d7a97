"""Nodes with a simulated clock, for the scheduler of real runs.

The tasks of a node share its read and its write bandwidth equally. A task streams: its speed is the
smallest of its core's rate, its share of reading, and its share of writing.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import Literal, cast

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.execution.cluster import Attempt, Cluster, Event, Resources
from mmerge.workers.task import TaskResult

Limit = Literal["cores", "reading", "writing", "too few shards"]
GB = 1e9


@dataclass(frozen=True)
class Nodes:
    """A cluster of equal nodes; bandwidths in bytes per second, memory in bytes, per node."""

    num_nodes: int
    num_cores: int
    read_bandwidth: float
    write_bandwidth: float
    memory: int | None = None


@dataclass(frozen=True)
class SimulatedTask:
    """A task as the scheduler sees it, the bytes it writes, and the rate of its core."""

    shard: str
    num_bytes: int
    peak_bytes: int
    bytes_out: int
    rate: float
    """Bytes of input per second."""
    phase: str = ""


@dataclass
class _Job:
    attempt: Attempt
    left: float
    """Bytes of input still to go, the constant cost of a task included."""
    size: float
    bytes_out: int
    rate: float
    phase: str


@dataclass
class _PhaseTimes:
    """Start of a phase's first task, end of its last one, and the limits of its tasks."""

    began: float
    ended: float
    waited: dict[Limit, float] = field(default_factory=dict)


@dataclass
class _Node:
    name: str
    jobs: list[_Job] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    since: float = 0.0
    version: int = 0
    memory: int = 0
    peak_memory: int = 0
    bytes_read: float = 0.0
    bytes_written: float = 0.0


class SimulatedCluster(Cluster):
    """Nodes whose clock advances only in `wait`."""

    def __init__(self, nodes: Nodes, *, task_seconds: float) -> None:
        self.nodes, self.task_seconds = nodes, task_seconds
        self.lost: dict[Limit, float] = {
            "cores": 0.0,
            "reading": 0.0,
            "writing": 0.0,
            "too few shards": 0.0,
        }
        """Seconds that nodes waited, by what for."""
        self.phases: dict[str, _PhaseTimes] = {}
        """By phase, in the order in which they began."""
        self.machines = [_Node(f"node{index}") for index in range(nodes.num_nodes)]
        self._clock = 0.0
        self._queue: list[Attempt] = []
        self._events: list[Event] = []
        self._ends: list[tuple[float, int, int]] = []

    def now(self) -> float:
        """Return simulated seconds."""
        return self._clock

    def num_slots(self, resources: Resources) -> int:
        """Return how many attempts of this size run at once."""
        per_node = self.nodes.num_cores
        if self.nodes.memory is not None:
            per_node = min(per_node, self.nodes.memory // max(resources.memory, 1))
        return per_node * len(self.machines)

    def start(self, attempt: Attempt) -> None:
        """Queue an attempt, and start what fits."""
        self._queue.append(attempt)
        self._fill()

    def cancel(self, attempt: Attempt) -> None:
        """Remove a queued attempt: the scheduler does so when it ends early."""
        self._queue = [queued for queued in self._queue if queued is not attempt]

    def wait(self, timeout: float | None) -> list[Event]:
        """Advance the clock to the next event, or by `timeout` seconds."""
        while not self._events:
            end = self._next_end()
            if timeout is not None and (end is None or end > self._clock + timeout):
                self._clock += timeout
                return []
            if end is None:
                raise MmergeError(
                    "the simulated nodes are too small for the largest task. Give them more memory,"
                    " or use a smaller --block-entries"
                )
            self._finish_until(end)
        events, self._events = self._events, []
        return events

    def update_accounts(self) -> None:
        """Bring every node's account up to the present."""
        for machine in self.machines:
            self._pass_time(machine)

    def _next_end(self) -> float | None:
        while self._ends and self._ends[0][2] != self.machines[self._ends[0][1]].version:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def _finish_until(self, end: float) -> None:
        """Advance the clock to `end`, and end the tasks that are due on all nodes.

        Nothing is placed in between: no node is served before the others.
        """
        self._clock = end
        following: float | None = end
        while following is not None and following <= end * (1 + 1e-9):
            self._finish(heapq.heappop(self._ends)[1])
            following = self._next_end()
        self._fill()

    def _finish(self, index: int) -> None:
        machine = self.machines[index]
        self._pass_time(machine)
        due = [job for job in machine.jobs if job.left <= 1e-6 * job.size]
        if not due:  # rounding: the one that this event is about
            due = [min(machine.jobs, key=lambda job: job.left)]
        for job in due:
            machine.jobs.remove(job)
            machine.memory -= job.attempt.resources.memory
            task = job.attempt.task
            result = TaskResult(task.shard, task.num_bytes, False, 0.0)
            self._events.append(Event(job.attempt, "finished", machine.name, result=result))
        self._plan(index)

    def _fill(self) -> None:
        while self._queue:
            attempt = self._queue[0]
            memory = attempt.resources.memory
            free = [
                index
                for index, machine in enumerate(self.machines)
                if len(machine.jobs) < self.nodes.num_cores
                and (self.nodes.memory is None or machine.memory + memory <= self.nodes.memory)
            ]
            if not free:
                return
            self._queue.pop(0)
            warm = [index for index in free if self.machines[index].name == attempt.prefer]
            self._place(
                attempt,
                warm[0] if warm else min(free, key=lambda index: len(self.machines[index].jobs)),
            )

    def _place(self, attempt: Attempt, index: int) -> None:
        machine = self.machines[index]
        self._pass_time(machine)
        task = cast("SimulatedTask", attempt.task)
        size = max(1.0, task.num_bytes + self.task_seconds * task.rate)
        machine.jobs.append(_Job(attempt, size, size, task.bytes_out, task.rate, task.phase))
        self.phases.setdefault(task.phase, _PhaseTimes(self._clock, self._clock))
        machine.memory += attempt.resources.memory
        machine.peak_memory = max(machine.peak_memory, machine.memory)
        machine.bytes_read += task.num_bytes
        machine.bytes_written += task.bytes_out
        self._events.append(Event(attempt, "started", machine.name))
        self._plan(index)

    def _pass_time(self, machine: _Node) -> None:
        passed = self._clock - machine.since
        if not machine.jobs:
            self.lost["too few shards"] += passed
        has_idle_cores = len(machine.jobs) < self.nodes.num_cores
        for job, speed in zip(machine.jobs, machine.speeds, strict=False):
            job.left -= speed * passed
            limit = self._limit_of(job, len(machine.jobs))
            if limit == "cores" and has_idle_cores:
                limit = "too few shards"  # a core is no limit while others of the node are idle
            share = passed / len(machine.jobs)
            self.lost[limit] += share
            phase = self.phases[job.phase]
            phase.ended = self._clock
            phase.waited[limit] = phase.waited.get(limit, 0.0) + share
        machine.since = self._clock

    def _plan(self, index: int) -> None:
        """Set the speeds of a node's tasks and when the first of them ends."""
        machine = self.machines[index]
        machine.version += 1
        machine.speeds = [
            min(self._speeds(job, len(machine.jobs)).values()) for job in machine.jobs
        ]
        if machine.jobs:
            left = min(
                job.left / speed for job, speed in zip(machine.jobs, machine.speeds, strict=True)
            )
            heapq.heappush(self._ends, (self._clock + max(left, 0.0), index, machine.version))

    def _speeds(self, job: _Job, num_jobs: int) -> dict[Limit, float]:
        writing = (
            self.nodes.write_bandwidth / num_jobs * job.size / job.bytes_out
            if job.bytes_out
            else float("inf")
        )
        return {
            "cores": job.rate,
            "reading": self.nodes.read_bandwidth / num_jobs,
            "writing": writing,
        }

    def _limit_of(self, job: _Job, num_jobs: int) -> Limit:
        speeds = self._speeds(job, num_jobs)
        return min(speeds, key=lambda limit: speeds[limit])
