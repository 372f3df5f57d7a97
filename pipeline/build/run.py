"""Run a plan: survey, thresholds, merge and copy, then the manifest, last and once."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from mmerge.manifests.digest import digest_bytes, digest_json
from mmerge.manifests.errors import TaskErrors
from mmerge.manifests.format.entry import ShardEntry, read_entry
from mmerge.manifests.format.manifest import (
    VERSION,
    Manifest,
    TableEntry,
    manifest_key,
    read_manifest,
    write_manifest,
)
from mmerge.manifests.format.references import Reference, write_reference
from mmerge.manifests.format.table import make_table
from mmerge.manifests.maintenance.lease import Claim
from mmerge.manifests.stores.create_check import check_store
from mmerge.manifests.stores.object_store import open_store
from mmerge.pipeline.build.input_survey import InputSurvey, make_survey_tasks
from mmerge.pipeline.build.manifest_records import make_records, read_files
from mmerge.pipeline.build.method_stages import StageRun
from mmerge.pipeline.build.provenance import add_inputs, describe_inputs
from mmerge.pipeline.build.shard import Flow
from mmerge.pipeline.build.task_factory import make_copy_task, make_merge_task
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.lora_adapter import open_expert
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import parse_numbers
from mmerge.workers.task import (
    CopyTask,
    MeasureTask,
    MergeTask,
    RefineTask,
    SurveyTask,
    Task,
    TaskResult,
)
from mmerge.workers.tasks.scan_cache import scan_key

FOLLOWING = {RefineTask: "thresholds", MergeTask: "merge", CopyTask: "carry"}
"""The phases of the tasks that follow from surveys."""


@dataclass
class RunReport:
    """What a run did."""

    uri: str
    build: str
    reference: Reference
    is_new: bool
    """False when the build was there already and nothing was computed."""
    moved: bool
    """Whether the reference was moved to this build."""
    num_computed: dict[str, int] = field(default_factory=dict)
    """Finished shards per phase."""
    num_reused: dict[str, int] = field(default_factory=dict)
    """Shards per phase that were there already."""
    bytes_read: int = 0
    manifest: Manifest | None = None


def run(
    plan: MergePlan,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> RunReport:
    """Build the composite of a plan and return what was done; a killed run continues where it was.

    Args:
        plan: from `make_plan`.
        executor: where tasks run; in this process if absent.
        progress: told of every shard; log lines if absent.
        fresh: compute everything again, whatever is in the store.

    Raises:
        StoreError: the store cannot be written.
        NonFiniteError: an input holds NaN or Inf.
        TaskErrors: several tasks failed; all others were finished and are kept.
    """
    builder = Builder(plan, executor or SerialExecutor(), progress or LogProgress(), fresh)
    check_store(builder.store)
    with Claim(builder.store, "run") as claim:
        claim.wait_for_none("collect")
        return builder.run()


class Builder:
    """One run of a plan: survey, thresholds, merge and copy, commit."""

    def __init__(
        self, plan: MergePlan, executor: Executor, progress: Progress, fresh: bool
    ) -> None:
        self.plan, self.executor, self.progress, self.fresh = plan, executor, progress, fresh
        self.recipe = plan.recipe
        self.store = open_store(plan.recipe.output, create=True)
        self.method = find_method(plan.recipe.method)
        self.base = Checkpoint(self.recipe.base, owner="base")
        self.experts = [
            open_expert(expert.uri, owner=f"expert {expert.name!r}", base=self.base)
            for expert in self.recipe.experts
        ]
        self.rescalers: tuple[float, ...] | None = None
        self.entries: dict[str, ShardEntry] = {}
        """What has been merged and copied so far, by the task's digest."""
        self.flowing: set[str] = set()
        """Phases that began while inputs were surveyed."""
        self.computed: dict[str, int] = {}
        self.reused: dict[str, int] = {}
        self.bytes_read = 0

    def run(self) -> RunReport:
        """Return the finished build. The store is known to be writable, and claimed."""
        numbers = self.plan.numbers
        trimmings = {
            name: self.method.trimming(*parse_numbers(self.method, found))
            for name, found in numbers.items()
        }
        trims = {name: trimming for name, trimming in trimmings.items() if trimming is not None}
        identities = {
            checkpoint.uri: checkpoint.identity for checkpoint in (self.base, *self.experts)
        }
        surveys = make_survey_tasks(self.plan, identities, magnitudes=bool(trims), fresh=self.fresh)
        flow = Flow(self.plan, surveys, trims or None, self.store, fresh=self.fresh)
        self._run_phase("survey", surveys, self._is_surveyed, flow)
        thresholds = flow.finish(self._run_refine)
        survey = flow.survey
        stages = StageRun(
            self.plan,
            self.method,
            numbers,
            surveys,
            thresholds,
            self._run_measure,
            self.store,
            self.base.text_config,
            self.fresh,
        )
        known = stages.run()
        self.rescalers = stages.rescalers()
        merge_tasks = [
            make_merge_task(self.plan, shard, survey, found, known, fresh=self.fresh)
            for shard, found in zip(self.plan.merge_shards, thresholds, strict=True)
        ]
        copy_tasks = [
            make_copy_task(self.plan, shard, survey, fresh=self.fresh)
            for shard in self.plan.copy_shards
        ]
        return self._commit(merge_tasks, copy_tasks, survey)

    def _run_refine(self, tasks: Sequence[RefineTask]) -> None:
        self._run_phase("thresholds", tasks, self._is_surveyed)

    def _run_measure(self, phase: str, tasks: Sequence[MeasureTask]) -> None:
        self._run_phase(phase, tasks, self._is_surveyed)

    def _is_surveyed(self, task: SurveyTask | RefineTask | MeasureTask) -> bool:
        return self.store.exists(scan_key(task.key))

    def _run_phase(
        self,
        phase: str,
        tasks: Sequence[Any],
        is_done: Callable[[Any], bool],
        flow: Flow | None = None,
    ) -> None:
        """Run the tasks that are not done yet, and those that follow from them; raise all their
        failures at the end.
        """
        done = [task for task in tasks if not self.fresh and is_done(task)]
        known = {id(task) for task in done}
        # The largest first: one that begins last would run alone at the end.
        waiting: list[Task] = sorted(
            (task for task in tasks if id(task) not in known), key=lambda task: -task.num_bytes
        )
        self._begin(phase, waiting, done)
        own = {id(task) for task in waiting}
        failures: list[Exception] = []

        def follow(task: Task, result: TaskResult) -> Sequence[Task]:
            found = flow.follow(task) if flow and not failures else []
            for one in found:
                self._begin_following(one)
            return found

        with closing(self.executor.run(waiting, self.store.uri, follow)) as outcomes:
            for task, outcome in outcomes:
                where = phase if id(task) in own else FOLLOWING[type(task)]
                if isinstance(outcome, TaskResult):
                    self._take(where, task, outcome)
                else:
                    failures.append(outcome)
                    self.progress.fail(where, task.shard, outcome)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise TaskErrors(sorted(str(failure) for failure in failures))

    def _begin(self, phase: str, waiting: Sequence[Task], done: Sequence[Task]) -> None:
        self.reused[phase] = self.reused.get(phase, 0) + len(done)
        self.computed.setdefault(phase, 0)
        if phase in self.flowing:
            self._skip(phase, done)
            return
        self.progress.begin(
            phase,
            num_bytes=sum(task.num_bytes for task in waiting),
            num_tasks=len(waiting),
            num_reused=len(done),
        )

    def _begin_following(self, task: Task) -> None:
        """Tell of a phase whose tasks begin during another one: of all its shards at once, where
        their number is known.
        """
        phase = FOLLOWING[type(task)]
        if phase == "thresholds":
            self._begin(phase, [task], [])
        elif phase not in self.flowing:
            self.reused[phase] = self.computed[phase] = 0
            self.flowing.add(phase)
            sizes = [shard.bytes_in for shard in self.plan.merge_shards]
            if phase == "carry":
                sizes = [shard.num_bytes for shard in self.plan.copy_shards]
            self.progress.begin(phase, num_bytes=sum(sizes), num_tasks=len(sizes), num_reused=0)

    def _skip(self, phase: str, tasks: Sequence[Task]) -> None:
        for task in tasks:
            self.progress.advance(phase, TaskResult(task.shard, 0, True, 0.0))

    def _take(self, phase: str, task: Task, result: TaskResult) -> None:
        if isinstance(task, (MergeTask, CopyTask)):
            self.entries[task.digest] = result.entry
        self.bytes_read += result.num_bytes
        (self.reused if result.reused else self.computed)[phase] += 1
        self.progress.advance(phase, result)

    def _commit(
        self, merge_tasks: list[MergeTask], copy_tasks: list[CopyTask], survey: InputSurvey
    ) -> RunReport:
        files, contents = read_files([self.base, *self.experts])
        records = make_records(self.plan, survey, files, self.rescalers)
        digests = [task.digest for task in merge_tasks] + [task.digest for task in copy_tasks]
        named = {**records, "version": VERSION, "base": records["base"].model_dump(mode="json")}
        named["experts"] = [expert.model_dump(mode="json") for expert in records["experts"]]
        build = digest_json({**named, "objects": digests})
        self.progress.name_build(build)
        uri = f"{self.store.uri}#{self.recipe.name}"
        if not self.fresh and self.store.exists(manifest_key(build)):
            manifest = read_manifest(self.store, build)
            reference, moved = self._refer(build)
            return RunReport(
                uri,
                build,
                reference,
                False,
                moved,
                self.computed,
                self.reused,
                self.bytes_read,
                manifest,
            )
        merged = add_inputs(
            self._run_tasks("merge", merge_tasks), describe_inputs(self.plan, survey, merge_tasks)
        )
        copied = self._run_tasks("carry", copy_tasks)
        copied = [
            _label(entry, shard.name, shard.expert)
            for entry, shard in zip(copied, self.plan.copy_shards, strict=True)
        ]
        for key, data in contents.items():
            self.store.put(key, data)
        manifest = self._make_manifest(build, records, [*merged, *copied])
        is_new = write_manifest(self.store, manifest)
        reference, moved = self._refer(build)
        return RunReport(
            uri,
            build,
            reference,
            is_new or self.fresh,
            moved,
            self.computed,
            self.reused,
            self.bytes_read,
            manifest,
        )

    def _run_tasks(self, phase: str, tasks: Sequence[MergeTask | CopyTask]) -> list[ShardEntry]:
        """Return the entries of these tasks in their order, from the store where they were finished
        before.
        """
        unique = _unique(tasks)
        left = [task for task in unique if task.digest not in self.entries]
        found = (
            {}
            if self.fresh
            else {
                task.digest: entry
                for task in left
                if (entry := read_entry(self.store, task.digest))
            }
        )
        if phase in self.flowing:
            counted = {id(task) for task in unique}
            self._skip(phase, [task for task in tasks if id(task) not in counted])
        self._run_phase(phase, left, lambda task: task.digest in found)
        self.entries |= found
        return [_label(self.entries[task.digest], task.shard, "") for task in tasks]

    def _make_manifest(
        self, build: str, records: dict[str, Any], entries: list[ShardEntry]
    ) -> Manifest:
        table = make_table(entries)
        key = f"builds/{build}/tensors.parquet"
        self.store.put(key, table)
        return Manifest(
            build=build,
            entries=tuple(entry.object for entry in entries),
            table=TableEntry(key=key, num_bytes=len(table), digest=digest_bytes(table)),
            **records,
        )

    def _refer(self, build: str) -> tuple[Reference, bool]:
        sources = {"base": self.recipe.base} | {
            expert.name: expert.uri for expert in self.recipe.experts
        }
        versions = {name: version(name) for name in ("mmerge", "torch", "numpy", "pyarrow")} | {
            "python": platform.python_version()
        }
        return write_reference(
            self.store, self.recipe.name, build, sources=sources, versions=versions
        )


def _unique(tasks: Sequence[MergeTask | CopyTask]) -> list[MergeTask | CopyTask]:
    """Return the tasks without those whose object another one writes as well."""
    return list({task.digest: task for task in reversed(tasks)}.values())[::-1]


def _label(entry: ShardEntry, shard: str, expert: str) -> ShardEntry:
    """Say to which shard and expert an entry belongs in this build: objects that builds share do
    not know.
    """
    return ShardEntry(
        object=entry.object.model_copy(update={"shard": shard, "expert": expert}),
        tensors=tuple(
            row.model_copy(update={"expert": expert or row.expert}) for row in entry.tensors
        ),
    )
