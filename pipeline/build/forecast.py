"""What a run of a plan would do: the builds of all shards, answered from the store alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

from mmerge.manifests.errors import ManifestError, NotFound
from mmerge.manifests.format.entry import ObjectEntry, find_entry
from mmerge.manifests.format.manifest import manifest_key, read_manifest
from mmerge.manifests.format.references import list_references, read_reference
from mmerge.manifests.format.stored_objects import find_object_damage
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.build.provenance import describe_inputs, explain
from mmerge.pipeline.build.shard import make_shard_builds
from mmerge.pipeline.build.shard_builds import Barrier, BuildTask, FinalTask
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.checkpoints.input_digests import InputChanged
from mmerge.workers.task import MergeTask, ScanTask, Task, TaskResult
from mmerge.workers.tasks.scan_cache import read_scan

State = Literal["compute", "reuse", "unknown"]


@dataclass(frozen=True)
class ShardForecast:
    """Whether one shard would be computed, and why."""

    shard: str
    task: Literal["merge", "copy"]
    state: State
    reason: str


@dataclass(frozen=True)
class Forecast:
    """The verdict on every shard. `to_scan` are the shards whose inputs must be read first."""

    shards: tuple[ShardForecast, ...]
    to_scan: tuple[str, ...] = ()

    def count(self, state: State) -> int:
        """Return how many shards are in a state."""
        return sum(shard.state == state for shard in self.shards)


def make_forecast(plan: MergePlan, *, scan: bool = False) -> Forecast:
    """Return what a run of this plan would compute. Writes nothing unless `scan` is set.

    Args:
        plan: from `make_plan`.
        scan: read inputs that changed since they were last read, and keep the results in the store
            as a run would; without it, shards that depend on such inputs are `unknown`.

    Raises:
        StoreError: the store cannot be read.
        TaskErrors, NonFiniteError: an input cannot be scanned.
    """
    try:
        store = open_store(plan.recipe.output, create=scan)
    except NotFound:
        return _all_new(plan)
    forecaster = _Forecaster(plan, store)
    if scan:
        forecaster.scan()
    return forecaster.judge()


class _Forecaster:
    def __init__(self, plan: MergePlan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.context = BuildContext(plan, fresh=False)
        self.builds = make_shard_builds(self.context)
        self.tasks = self.builds.start(self._find)

    def _find(self, task: BuildTask) -> Any:
        """Return what the store has of a task."""
        if isinstance(task, FinalTask):
            entry = find_entry(self.store, task.digest)
            if entry is None or find_object_damage(self.store, entry.object) is not None:
                return None
            return entry
        return read_scan(self.store, task.key)

    def scan(self) -> None:
        """Run all tasks that come before merging and copying."""

        def follow(task: Task, result: TaskResult) -> Sequence[Task]:
            assert not isinstance(task, FinalTask)
            assert isinstance(task, BuildTask)
            if result.changed_input is not None:
                raise InputChanged(result.changed_input)
            scan = read_scan(self.store, task.key)
            return _without_final(self.builds.follow(task, scan, self._find))

        tasks = _without_final(self.tasks)
        with closing(SerialExecutor().run(tasks, self.store.uri, follow)) as outcomes:
            for _, outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome

    def judge(self) -> Forecast:
        """Return the verdict on every shard."""
        requests = self.builds.requests
        scans = [task for task in requests.values() if isinstance(task, ScanTask)]
        to_scan = tuple(dict.fromkeys(task.shard for task in scans))
        if not self._has_builds():
            return Forecast(_all_new(self.plan).shards, to_scan)
        earlier = _read_earlier(self.store, self.plan.recipe.name)
        merges = [task for task in requests.values() if isinstance(task, MergeTask)]
        inputs = describe_inputs(self.plan, self.context.digests, merges)
        shards = []
        for shard in self.plan.merge_shards:
            reason = ""
            if shard.name in inputs:
                reason = explain(earlier.get(shard.name), inputs[shard.name])
            shards.append(self._judge_shard(shard.name, "merge", reason, to_scan))
        for copy_shard in self.plan.copy_shards:
            is_new = copy_shard.name not in earlier
            reason = "no earlier build of this name has it" if is_new else "its bytes changed"
            shards.append(self._judge_shard(copy_shard.name, "copy", reason, to_scan))
        return Forecast(tuple(shards), to_scan)

    def _judge_shard(
        self, shard: str, task: Literal["merge", "copy"], reason: str, to_scan: tuple[str, ...]
    ) -> ShardForecast:
        """Return the verdict on a shard; `reason` is why its object would be made anew."""
        request = self.builds.requests.get(shard)
        if request is None:
            return ShardForecast(shard, task, "reuse", "made from the same inputs and parameters")
        if isinstance(request, FinalTask):
            return ShardForecast(shard, task, "compute", reason)
        return ShardForecast(shard, task, "unknown", _explain_unknown(request, to_scan))

    def _has_builds(self) -> bool:
        return any(any(True for _ in self.store.list(folder)) for folder in ("refs", "objects"))


def _explain_unknown(request: BuildTask | Barrier, to_scan: tuple[str, ...]) -> str:
    """Return what a shard waits for, whose last task depends on it."""
    if isinstance(request, ScanTask):
        return "inputs not read yet, or changed since"
    if isinstance(request, Barrier):
        return f"waits for other shards, {len(to_scan)} of which must be scanned first"
    return f"phase {request.phase!r} not computed yet"


def _without_final(tasks: Sequence[BuildTask]) -> list[BuildTask]:
    return [task for task in tasks if not isinstance(task, FinalTask)]


def _all_new(plan: MergePlan) -> Forecast:
    reason = "nothing is in the store yet"
    merges = [ShardForecast(s.name, "merge", "compute", reason) for s in plan.merge_shards]
    copies = [ShardForecast(s.name, "copy", "compute", reason) for s in plan.copy_shards]
    return Forecast((*merges, *copies))


def _read_earlier(store: Store, name: str) -> dict[str, ObjectEntry]:
    """Return the objects of the newest build of this name, by shard; empty if it is unreadable."""
    numbers = list_references(store).get(name, [])
    if not numbers:
        return {}
    build = read_reference(store, name, numbers[-1]).build
    if not store.exists(manifest_key(build)):
        return {}
    try:
        return {entry.shard: entry for entry in read_manifest(store, build).entries}
    except ManifestError:
        return {}


def forecast_to_json(forecast: Forecast) -> dict[str, Any]:
    """Return a forecast as JSON."""
    return {
        "compute": forecast.count("compute"),
        "reuse": forecast.count("reuse"),
        "unknown": forecast.count("unknown"),
        "to_scan": list(forecast.to_scan),
        "shards": [vars(shard) for shard in forecast.shards],
    }
