"""How long a plan takes on a cluster that need not exist.

The builds of all shards are driven as in a run: by the scheduler of real runs over simulated nodes.
Scans and stages are answered with assumed results, so that every shard takes the steps of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from mmerge.manifests.errors import ManifestError, MmergeError
from mmerge.manifests.format.entry import ObjectEntry, ShardEntry, object_key
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.build.shard import make_shard_builds
from mmerge.pipeline.build.shard_builds import BuildTask, FinalTask
from mmerge.pipeline.execution.scheduler import Policy, dispatch
from mmerge.pipeline.execution.simulated_cluster import (
    GB,
    Limit,
    Nodes,
    SimulatedCluster,
    SimulatedTask,
)
from mmerge.pipeline.monitoring.run_records import RunStatus
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.task import (
    CopyTask,
    MeasureTask,
    MergeTask,
    OnePassTask,
    RefineTask,
    Task,
    TaskResult,
)
from mmerge.workers.tasks.scan_cache import ScanResult, SparseHistogram, piece_name

FIXED_PHASES = frozenset({"scan", "thresholds", "merge", "copy"})
"""Phases that have a rate of their own; all others are stages of a method."""


@dataclass(frozen=True)
class Rates:
    """Bytes of input per second and core in each phase, and seconds lost per run, phase and task.

    The defaults follow from measurements on one core, one after the other: reading 5.7 GB/s,
    BLAKE3 5.5, exact histograms 1.6, the fused merge 2.8, writing 4.1. The rates of a measured run
    (`to_rates`) are better.
    """

    scan: float = 1.0 * GB
    thresholds: float | None = None
    """None where the scan alone gives the thresholds."""
    stages: float = 1.0 * GB
    """Statistics passes of the method."""
    merge: float = 1.4 * GB
    copy: float = 1.3 * GB
    task_seconds: float = 0.01
    """From the end of a task to the beginning of the next one on its core."""
    phase_seconds: float = 0.2
    """Between phases, when only the driver works."""
    start_seconds: float = 5.0
    """Until the first worker has connected and imported its modules; all start at once."""


@dataclass(frozen=True)
class SimulatedPhase:
    """One phase of a simulated run. Phases overlap where shards do not wait for each other."""

    name: str
    num_tasks: int
    seconds: float
    """From the beginning of its first task to the end of its last one."""
    limit: Limit


@dataclass(frozen=True)
class Simulation:
    """A simulated run. Numbers per node are those of the node that has most."""

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


def simulate(plan: MergePlan, nodes: Nodes, *, rates: Rates | None = None) -> Simulation:
    """Return how a run of this plan goes on such nodes, with an empty store.

    Raises:
        MmergeError: the nodes' memory does not hold the largest task.
    """
    rates = rates or Rates()
    if nodes.memory is not None and plan.peak_bytes > nodes.memory:
        raise MmergeError(
            f"the largest task needs {plan.peak_bytes / GB:.1f} GB, a node has"
            f" {nodes.memory / GB:.1f} GB. Use larger nodes, or a smaller --block-entries"
        )
    builds = make_shard_builds(BuildContext(plan, fresh=True))
    bytes_out = {shard.name: shard.bytes_out for shard in plan.merge_shards}
    originals: dict[int, tuple[SimulatedTask, BuildTask]] = {}
    num_tasks: dict[str, int] = {}

    def to_simulated(tasks: Sequence[BuildTask]) -> list[Task]:
        simulated_tasks = []
        for task in sorted(tasks, key=lambda task: -task.num_bytes):
            simulated = _simulate_task(task, rates, bytes_out)
            originals[id(simulated)] = (simulated, task)
            num_tasks[task.phase] = num_tasks.get(task.phase, 0) + 1
            simulated_tasks.append(cast("Task", simulated))
        return simulated_tasks

    def follow(simulated: Task, result: TaskResult) -> Sequence[Task]:
        _, task = originals.pop(id(simulated))
        return to_simulated(builds.follow(task, _assume_result(task, rates)))

    cluster = SimulatedCluster(nodes, task_seconds=rates.task_seconds)
    policy = Policy(deadline_seconds=float("inf"))
    first_tasks = to_simulated(builds.start(lambda _: None))
    for _ in dispatch(first_tasks, cluster, policy=policy, follow=follow):
        pass
    cluster.update_accounts()
    phases = []
    for name, times in cluster.phases.items():
        seconds = times.ended - times.began + rates.phase_seconds
        phases.append(SimulatedPhase(name, num_tasks[name], seconds, _largest(times.waited)))
    return Simulation(
        nodes=nodes,
        seconds=rates.start_seconds + cluster.now() + len(phases) * rates.phase_seconds,
        phases=tuple(phases),
        limit=_largest(cluster.lost),
        bytes_read_per_node=round(max(machine.bytes_read for machine in cluster.machines)),
        bytes_written_per_node=round(max(machine.bytes_written for machine in cluster.machines)),
        memory_per_node=max(machine.peak_memory for machine in cluster.machines),
        num_tasks=sum(num_tasks.values()),
        start_seconds=rates.start_seconds,
    )


def to_rates(status: RunStatus) -> Rates:
    """Return the rates that a run measured; the assumed ones where it computed nothing.

    Where phases overlapped, the seconds between them cannot be measured, and are the assumed ones.

    Raises:
        ManifestError: the run computed nothing at all.
    """
    measured = {
        name: phase for name, phase in status.phases.items() if phase.bytes_read and phase.seconds
    }
    if not measured:
        raise ManifestError(
            f"{status.name}: run {status.number} computed nothing, so it measured nothing. Name a"
            " run that did"
        )
    rates = Rates(start_seconds=status.start_seconds)
    for name in FIXED_PHASES & measured.keys():
        rates = replace(rates, **{name: measured[name].bytes_read / measured[name].seconds})
    stages = [phase for name, phase in measured.items() if name not in FIXED_PHASES]
    if stages:
        num_bytes = sum(phase.bytes_read for phase in stages)
        rates = replace(rates, stages=num_bytes / sum(phase.seconds for phase in stages))
    between = status.wall_seconds - sum(phase.wall_seconds for phase in status.phases.values())
    if status.wall_seconds and between > 0:
        rates = replace(rates, phase_seconds=between / len(status.phases))
    return rates


def _simulate_task(task: BuildTask, rates: Rates, bytes_out: dict[str, int]) -> SimulatedTask:
    rate, written = rates.scan, 0
    if isinstance(task, RefineTask):
        rate = rates.thresholds or rates.scan
    elif isinstance(task, MeasureTask):
        rate = rates.stages
    elif isinstance(task, MergeTask):
        rate, written = rates.merge, bytes_out[task.shard]
    elif isinstance(task, CopyTask):
        rate, written = rates.copy, task.num_bytes
    return SimulatedTask(
        task.shard, task.num_bytes, task.peak_bytes, written, rate, phase=task.phase
    )


def _assume_result(task: BuildTask, rates: Rates) -> Any:
    """Return a result of a task that leads its shard to the next step of a run."""
    if isinstance(task, FinalTask):
        entry = ObjectEntry(
            key=object_key(task.digest),
            shard=task.shard,
            role="merge" if isinstance(task, MergeTask) else task.role,
            num_bytes=0,
            digest=task.digest,
        )
        return ShardEntry(object=entry, tensors=())
    if isinstance(task, OnePassTask):
        return _assume_result(task.scan, rates)
    if isinstance(task, MeasureTask):
        return ScanResult({}, {})
    digests = {}
    histograms = {}
    # An even bin holds one magnitude; a threshold in an odd one needs a second pass.
    bin_number = 0 if rates.thresholds is None or isinstance(task, RefineTask) else 1
    for tensor in task.tensors:
        piece = piece_name(tensor.name, tensor.row_start)
        digests[piece] = [""] * (1 + len(tensor.experts))
        for position in range(len(tensor.experts)):
            histograms[f"{piece}:{position}"] = _one_bin(bin_number, tensor.num_entries)
    if not isinstance(task, RefineTask):
        for copy in task.copies:
            # With its owner: equal copies of two experts would count as one object.
            piece = piece_name(f"{copy.role}/{copy.name}", copy.row_start)
            digests[piece] = [f"{task.copies_owner} {piece}"]
    return ScanResult(digests, histograms)


def _one_bin(bin_number: int, count: int) -> SparseHistogram:
    return np.array([bin_number], np.uint32), np.array([count], np.int64)


def _largest(seconds: dict[Limit, float]) -> Limit:
    return max(seconds, key=lambda limit: seconds[limit], default="too few shards")
