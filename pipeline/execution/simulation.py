"""How long a plan takes on a cluster that need not exist: the scheduler of real runs over nodes
with a simulated clock.

A node's tasks share its two links to the store equally; each task streams, so it goes as fast as
the slowest of its core, its share of reading and its share of writing lets it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.execution.scheduler import Attempt, Cluster, Event, Policy, Resources, dispatch
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.task import Task, TaskResult

Limit = Literal["cores", "reading", "writing", "too few shards"]
GB = 1e9


@dataclass(frozen=True)
class Nodes:
    """A cluster of equal nodes; bandwidths in bytes per second and node, memory in bytes per node."""

    num_nodes: int
    num_cores: int
    read_bandwidth: float
    write_bandwidth: float
    memory: int | None = None


@dataclass(frozen=True)
class Rates:
    """Bytes of input per second that one core gets through in each phase, and seconds lost per run,
    per phase and per task.

    The defaults follow from what was measured on one core, one after the other: reading 5.7 GB/s,
    BLAKE3 5.5, exact histograms 1.6, the fused merge 2.8, writing 4.1. A measured run knows better:
    `from_phases`.
    """

    survey: float = 1.0 * GB
    thresholds: float | None = None
    """None where the survey alone gives the thresholds."""
    merge: float = 1.4 * GB
    carry: float = 1.3 * GB
    task_seconds: float = 0.01
    """From the end of a task to the beginning of the next one on its core."""
    phase_seconds: float = 0.2
    """Between phases, when only the driver works."""
    start_seconds: float = 5.0
    """Until the first worker has connected and imported what it needs; all workers start at once.
    """


@dataclass(frozen=True)
class SimulatedTask:
    """What the scheduler sees of a task, and what it writes."""

    shard: str
    num_bytes: int
    peak_bytes: int
    bytes_out: int
    rate: float


@dataclass(frozen=True)
class SimulatedPhase:
    """One phase of a simulated run."""

    name: str
    num_tasks: int
    seconds: float
    limit: Limit


@dataclass(frozen=True)
class Simulation:
    """A simulated run. Per-node numbers are those of the node that has most."""

    nodes: Nodes
    seconds: float
    phases: tuple[SimulatedPhase, ...]
    limit: Limit
    """What the nodes wait for most of the time."""
    bytes_read_per_node: int
    bytes_written_per_node: int
    memory_per_node: int
    num_tasks: int
    start_seconds: float
    """Of `seconds`, until the workers are there."""


@dataclass
class _Job:
    attempt: Attempt
    left: float
    """Bytes of input still to go, the constant cost of a task included."""
    size: float
    bytes_out: int
    rate: float


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
    """Nodes on which time passes only while somebody waits for it."""

    def __init__(self, nodes: Nodes, *, task_seconds: float) -> None:
        self.nodes, self.task_seconds = nodes, task_seconds
        self.lost: dict[Limit, float] = {
            "cores": 0.0,
            "reading": 0.0,
            "writing": 0.0,
            "too few shards": 0.0,
        }
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
        """Take an attempt away; nothing in a simulation calls for it but the scheduler's own
        clearing up.
        """
        self._queue = [found for found in self._queue if found is not attempt]

    def wait(self, timeout: float | None) -> list[Event]:
        """Let time pass until something happens or `timeout` is over."""
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
        found, self._events = self._events, []
        return found

    def settle(self) -> None:
        """Bring every node's account up to the present."""
        for machine in self.machines:
            self._pass_time(machine)

    def _next_end(self) -> float | None:
        while self._ends and self._ends[0][2] != self.machines[self._ends[0][1]].version:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else None

    def _finish_until(self, end: float) -> None:
        """Let time pass to `end`, and end what is due on all nodes before anything else is placed:
        none of them is first.
        """
        self._clock = end
        while (following := self._next_end()) is not None and following <= end * (1 + 1e-9):
            self._finish(heapq.heappop(self._ends)[1])
        self._fill()

    def _finish(self, index: int) -> None:
        machine = self.machines[index]
        self._pass_time(machine)
        # The one that was due, and whatever ends with it.
        due = [job for job in machine.jobs if job.left <= 1e-6 * job.size] or [
            min(machine.jobs, key=lambda job: job.left)
        ]
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
        machine.jobs.append(_Job(attempt, size, size, task.bytes_out, task.rate))
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
            # A core is no limit while others of the node have nothing to do.
            self.lost["too few shards" if limit == "cores" and has_idle_cores else limit] += (
                passed / len(machine.jobs)
            )
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


def simulate(plan: MergePlan, nodes: Nodes, *, rates: Rates | None = None) -> Simulation:
    """Return how a run of this plan goes on such nodes, nothing of it being there already.

    Raises:
        MmergeError: the nodes' memory does not hold the largest task.
    """
    rates = rates or Rates()
    total, num_tasks = rates.start_seconds, 0
    phases: list[SimulatedPhase] = []
    lost: dict[Limit, float] = {}
    known: dict[str, str] = {}
    cluster = SimulatedCluster(nodes, task_seconds=rates.task_seconds)
    for name, tasks in _make_phases(plan, rates):
        if (
            nodes.memory is not None
            and max((task.peak_bytes for task in tasks), default=0) > nodes.memory
        ):
            raise MmergeError(
                f"phase {name}: a task needs {max(task.peak_bytes for task in tasks) / GB:.1f} GB,"
                f" a node has {nodes.memory / GB:.1f} GB"
            )
        began, before = cluster.now(), dict(cluster.lost)
        for _ in dispatch(
            cast("Sequence[Task]", tasks),
            cluster,
            policy=Policy(deadline_seconds=float("inf")),
            nodes=known,
        ):
            pass
        cluster.settle()
        here = {limit: seconds - before[limit] for limit, seconds in cluster.lost.items()}
        lost = {limit: lost.get(limit, 0.0) + seconds for limit, seconds in here.items()}
        seconds = cluster.now() - began + rates.phase_seconds
        phases.append(
            SimulatedPhase(name, len(tasks), seconds, max(here, key=lambda limit: here[limit]))
        )
        total += seconds
        num_tasks += len(tasks)
    return Simulation(
        nodes=nodes, seconds=total, phases=tuple(phases), limit=max(lost, key=lambda limit: lost[limit]),
        bytes_read_per_node=round(max(machine.bytes_read for machine in cluster.machines)),
        bytes_written_per_node=round(max(machine.bytes_written for machine in cluster.machines)),
        memory_per_node=max(machine.peak_memory for machine in cluster.machines), num_tasks=num_tasks,
        start_seconds=rates.start_seconds,
    )  # fmt: skip


def _make_phases(plan: MergePlan, rates: Rates) -> list[tuple[str, list[SimulatedTask]]]:
    """Return the phases of a run with their tasks, as `run` makes them."""
    merged = {tensor.name for shard in plan.merge_shards for tensor in shard.tensors}
    survey = [
        SimulatedTask(shard.name, shard.bytes_in, shard.peak_bytes, 0, rates.survey)
        for shard in plan.merge_shards
    ]
    for shard in plan.copy_shards:
        # Base tensors that are merged as well are read once, with the merge shard.
        num_bytes = sum(
            tensor.source.spec.num_bytes
            for tensor in shard.tensors
            if shard.role == "carry" or tensor.name not in merged
        )
        if num_bytes:
            survey.append(SimulatedTask(shard.name, num_bytes, shard.peak_bytes, 0, rates.survey))
    merge = [
        SimulatedTask(shard.name, shard.bytes_in, shard.peak_bytes, shard.bytes_out, rates.merge)
        for shard in plan.merge_shards
    ]
    carry = [
        SimulatedTask(shard.name, shard.num_bytes, shard.peak_bytes, shard.num_bytes, rates.carry)
        for shard in plan.copy_shards
    ]
    phases = [("survey", survey), ("merge", merge), ("carry", carry)]
    if rates.thresholds is not None:
        refine = [
            SimulatedTask(shard.name, shard.bytes_in, shard.peak_bytes, 0, rates.thresholds)
            for shard in plan.merge_shards
        ]
        phases.insert(1, ("thresholds", refine))
    return phases
