"""What a run of a plan would compute, what it would find in the store, and why: the run itself,
stopped before its first write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import override

from mmerge.manifests.errors import ManifestError, NotFound
from mmerge.manifests.format.entry import ObjectEntry, read_entry
from mmerge.manifests.format.manifest import manifest_key, read_manifest
from mmerge.manifests.format.references import list_references, read_reference
from mmerge.manifests.stores.object_store import Store, open_store
from mmerge.pipeline.build.input_survey import InputSurvey
from mmerge.pipeline.build.provenance import describe_inputs, explain
from mmerge.pipeline.build.run import Builder, RunReport
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.task import CopyTask, MergeTask, SurveyTask, Task, TaskResult

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
    """What a run would do. `to_survey` are the shards whose inputs must be read before more can be
    said.
    """

    shards: tuple[ShardForecast, ...]
    to_survey: tuple[str, ...] = ()

    def count(self, state: State) -> int:
        """Return how many shards are in a state."""
        return sum(shard.state == state for shard in self.shards)


class _Stop(Exception):
    """Ends a forecast at the first task that would have to run."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks


class _NothingRuns(Executor):
    """Stops at the first phase that has tasks left; with `survey` it does the passes over the
    inputs that come before merging.
    """

    def __init__(self, *, survey: bool) -> None:
        self._inner = SerialExecutor() if survey else None

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        if tasks and (self._inner is None or isinstance(tasks[0], (MergeTask, CopyTask))):
            raise _Stop(tasks)
        if self._inner:
            yield from self._inner.run(tasks, store_uri)

    @override
    def close(self) -> None:
        return None


class _Silent(Progress):
    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        return None

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        return None

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        return None


class _Forecaster(Builder):
    """A run that looks for each object instead of making it."""

    found: Forecast | None = None

    @override
    def _commit(
        self, merge_tasks: list[MergeTask], copy_tasks: list[CopyTask], survey: InputSurvey
    ) -> RunReport:
        earlier = _read_earlier(self.store, self.recipe.name)
        inputs = describe_inputs(self.plan, survey, merge_tasks)
        shards = []
        for merge in merge_tasks:
            reason = explain(earlier.get(merge.shard), inputs[merge.shard])
            shards.append(_judge(self.store, merge.shard, "merge", merge.digest, reason))
        for copy in copy_tasks:
            old = earlier.get(copy.shard)
            reason = "no earlier build of this name has it" if old is None else "its bytes changed"
            shards.append(_judge(self.store, copy.shard, "copy", copy.digest, reason))
        self.found = Forecast(tuple(shards))
        raise _Stop(())


def make_forecast(
    plan: MergePlan, *, survey: bool = False, progress: Progress | None = None
) -> Forecast:
    """Return what a run of this plan would compute. Reads headers and the store; writes nothing
    unless `survey` is set.

    Args:
        plan: from `make_plan`.
        survey: read inputs that changed since they were last read, and keep what was found in the
            store, as a run would; without it, shards with such inputs are `unknown`.
        progress: told of the survey.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        open_store(plan.recipe.output, create=survey)
    except NotFound:
        return _all_new(plan)
    runner = _Forecaster(plan, _NothingRuns(survey=survey), progress or _Silent(), False)
    try:
        runner.run()
    except _Stop as stop:
        return runner.found or _stopped(plan, stop.tasks, runner)
    raise AssertionError("a forecast ends at its first task")


def _all_new(plan: MergePlan) -> Forecast:
    reason = "nothing is in the store yet"
    return Forecast(
        tuple(ShardForecast(shard.name, "merge", "compute", reason) for shard in plan.merge_shards)
        + tuple(ShardForecast(shard.name, "copy", "compute", reason) for shard in plan.copy_shards)
    )


def _stopped(plan: MergePlan, tasks: Sequence[Task], runner: _Forecaster) -> Forecast:
    """Say which inputs have to be read first; what the others come to may depend on them
    (thresholds of scope `model`).
    """
    waiting = tuple(task.shard for task in tasks)
    if not any(True for _ in runner.store.list("refs")) and not any(
        True for _ in runner.store.list("objects")
    ):
        return Forecast(_all_new(plan).shards, waiting)
    kind = (
        "inputs not read yet, or changed since"
        if isinstance(tasks[0], SurveyTask)
        else "thresholds not computed yet"
    )
    other = "follows from the inputs that are still to be read"
    shards = [
        ShardForecast(shard.name, "merge", "unknown", kind if shard.name in waiting else other)
        for shard in plan.merge_shards
    ]
    shards += [
        ShardForecast(shard.name, "copy", "unknown", kind if shard.name in waiting else other)
        for shard in plan.copy_shards
    ]
    return Forecast(tuple(shards), waiting)


def _judge(
    store: Store, shard: str, task: Literal["merge", "copy"], digest: str, reason: str
) -> ShardForecast:
    if read_entry(store, digest) is not None:
        return ShardForecast(shard, task, "reuse", "made from the same inputs and numbers")
    return ShardForecast(shard, task, "compute", reason)


def _read_earlier(store: Store, name: str) -> dict[str, ObjectEntry]:
    """Return the objects of the newest build of this name, by shard."""
    numbers = list_references(store).get(name, [])
    if not numbers:
        return {}
    build = read_reference(store, name, numbers[-1]).build
    try:
        return (
            {entry.shard: entry for entry in read_manifest(store, build).entries}
            if store.exists(manifest_key(build))
            else {}
        )
    except ManifestError:
        return {}


def forecast_to_json(forecast: Forecast) -> dict[str, Any]:
    """Return a forecast as JSON."""
    return {
        "compute": forecast.count("compute"),
        "reuse": forecast.count("reuse"),
        "unknown": forecast.count("unknown"),
        "to_survey": list(forecast.to_survey),
        "shards": [vars(shard) for shard in forecast.shards],
    }
