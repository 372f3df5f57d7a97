"""Run a plan: survey, thresholds, merge and copy, then the manifest, last and once."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from mmerge.manifests.claim import Claim
from mmerge.manifests.digest import digest_bytes, digest_json
from mmerge.manifests.entry import ShardEntry, read_entry
from mmerge.manifests.errors import TaskErrors
from mmerge.manifests.manifest import (
    VERSION,
    BaseRecord,
    ExpertRecord,
    FileEntry,
    Manifest,
    TableEntry,
    manifest_key,
    read_manifest,
    write_manifest,
)
from mmerge.manifests.probe import check_store
from mmerge.manifests.reference import Reference, write_reference
from mmerge.manifests.store import open_store
from mmerge.manifests.table import make_table
from mmerge.pipeline.executor import Executor, SerialExecutor
from mmerge.pipeline.inputs import add_inputs, describe_inputs
from mmerge.pipeline.plan import CopyShard, MergePlan, MergeShard
from mmerge.pipeline.progress import LogProgress, Progress
from mmerge.pipeline.stages import StageRun, to_hex
from mmerge.pipeline.survey import InputSurvey, make_survey_tasks, read_surveys, resolve_thresholds
from mmerge.workers.adapter import open_expert
from mmerge.workers.checkpoint import Checkpoint
from mmerge.workers.measure import parse_numbers
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Known
from mmerge.workers.task import CopyTask, MeasureTask, MergeTask, RefineTask, Task, TaskResult

ARITHMETIC_VERSION = 1
"""Raised when a change of a method or of an object's layout would change bytes: no older object is then reused."""


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


def run(plan: MergePlan, *, executor: Executor | None = None, progress: Progress | None = None, fresh: bool = False) -> RunReport:
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

    def __init__(self, plan: MergePlan, executor: Executor, progress: Progress, fresh: bool) -> None:
        self.plan, self.executor, self.progress, self.fresh = plan, executor, progress, fresh
        self.recipe = plan.recipe
        self.store = open_store(plan.recipe.output, create=True)
        self.method = find_method(plan.recipe.method)
        self.base = Checkpoint(self.recipe.base, owner="base")
        self.experts = [open_expert(expert.uri, owner=f"expert {expert.name!r}", base=self.base) for expert in self.recipe.experts]
        self.rescalers: tuple[float, ...] | None = None
        self.computed: dict[str, int] = {}
        self.reused: dict[str, int] = {}
        self.bytes_read = 0

    def run(self) -> RunReport:
        """Return the finished build. The store is known to be writable, and claimed."""
        numbers = self.plan.numbers
        trimmings = {name: self.method.trimming(*parse_numbers(self.method, found)) for name, found in numbers.items()}
        trims = {name: trimming for name, trimming in trimmings.items() if trimming is not None}
        identities = {checkpoint.uri: checkpoint.identity for checkpoint in (self.base, *self.experts)}
        surveys = make_survey_tasks(self.plan, identities, magnitudes=bool(trims), fresh=self.fresh)
        self._run_phase("survey", surveys, lambda task: self.store.exists(f"surveys/{task.key}.safetensors"))
        survey = read_surveys(self.store, self.plan, surveys)
        thresholds = resolve_thresholds(self.plan, surveys, survey, trimmings=trims or None, run_refine=self._run_refine, store=self.store)
        stages = StageRun(
            self.plan, self.method, numbers, surveys, thresholds, self._run_measure, self.store, self.base.text_config, self.fresh
        )
        known = stages.run()
        self.rescalers = stages.rescalers()
        merge_tasks = [
            self._make_merge_task(shard, survey, found, known) for shard, found in zip(self.plan.merge_shards, thresholds, strict=True)
        ]
        copy_tasks = [self._make_copy_task(shard, survey) for shard in self.plan.copy_shards]
        return self._commit(merge_tasks, copy_tasks, survey)

    def _run_refine(self, tasks: Sequence[RefineTask]) -> None:
        self._run_phase("thresholds", tasks, lambda task: self.store.exists(f"surveys/{task.key}.safetensors"))

    def _run_measure(self, phase: str, tasks: Sequence[MeasureTask]) -> None:
        self._run_phase(phase, tasks, lambda task: self.store.exists(f"surveys/{task.key}.safetensors"))

    def _run_phase(self, phase: str, tasks: Sequence[Any], is_done: Callable[[Any], bool]) -> dict[str, TaskResult]:
        """Run the tasks that are not done yet; raise all their failures at the end."""
        waiting: list[Task] = [task for task in tasks if self.fresh or not is_done(task)]
        self.reused[phase] = len(tasks) - len(waiting)
        self.computed[phase] = 0
        self.progress.begin(phase, num_bytes=sum(task.num_bytes for task in waiting), num_tasks=len(waiting), num_reused=self.reused[phase])
        results: dict[str, TaskResult] = {}
        failures: list[Exception] = []
        for task, outcome in self.executor.run(waiting, self.store.uri):
            if isinstance(outcome, TaskResult):
                results[task.shard] = outcome
                self.bytes_read += outcome.num_bytes
                (self.reused if outcome.reused else self.computed)[phase] += 1
                self.progress.advance(phase, outcome)
            else:
                failures.append(outcome)
                self.progress.fail(phase, task.shard, outcome)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise TaskErrors(sorted(str(failure) for failure in failures))
        return results

    def _make_merge_task(
        self, shard: MergeShard, survey: InputSurvey, thresholds: tuple[tuple[float, ...], ...], known: dict[str, Known]
    ) -> MergeTask:
        names = tuple(expert.name for expert in self.recipe.experts)
        numbers = tuple(self.plan.numbers[tensor.name] for tensor in shard.tensors)
        found = tuple(known[tensor.name] for tensor in shard.tensors)
        identity = {
            "arithmetic": ARITHMETIC_VERSION,
            "method": self.recipe.method,
            "experts": list(names),
            "dtype": self.plan.dtype,
            "tensors": [
                {
                    "name": tensor.name,
                    "row_start": tensor.row_start,
                    "shape": list(tensor.base.spec.shape),
                    "inputs": survey.describe(tensor),
                    "parameters": [number.parameters, list(number.experts)],
                    "thresholds": [value.hex() for value in values],
                    "known": to_hex(numbers_found),
                }
                for tensor, number, values, numbers_found in zip(shard.tensors, numbers, thresholds, found, strict=True)
            ],
        }
        return MergeTask(
            digest=digest_json(identity), shard=shard.name, expert_names=names, tensors=shard.tensors, thresholds=thresholds,
            method=self.recipe.method, numbers=numbers, known=found, dtype=self.plan.dtype,
            block_entries=self.plan.block_entries, num_bytes=shard.bytes_in, peak_bytes=shard.peak_bytes, fresh=self.fresh,
        )  # fmt: skip

    def _make_copy_task(self, shard: CopyShard, survey: InputSurvey) -> CopyTask:
        identity = {
            "arithmetic": ARITHMETIC_VERSION,
            "role": shard.role,
            "tensors": [
                [
                    tensor.name,
                    tensor.role,
                    tensor.row_start,
                    tensor.source.spec.dtype,
                    list(tensor.source.spec.shape),
                    survey.digest_of(shard, tensor),
                ]
                for tensor in shard.tensors
            ],
        }
        # The expert's name is not part of the identity: two builds, or two experts, share what they have in common.
        return CopyTask(
            digest=digest_json(identity), shard=shard.name, role=shard.role, expert="", tensors=shard.tensors,
            block_entries=self.plan.block_entries, num_bytes=shard.num_bytes, peak_bytes=shard.peak_bytes, fresh=self.fresh,
        )  # fmt: skip

    def _commit(self, merge_tasks: list[MergeTask], copy_tasks: list[CopyTask], survey: InputSurvey) -> RunReport:
        files, contents = self._read_files()
        records = self._make_records(survey, files)
        digests = [task.digest for task in merge_tasks] + [task.digest for task in copy_tasks]
        named = {**records, "version": VERSION, "base": records["base"].model_dump(mode="json")}
        named["experts"] = [expert.model_dump(mode="json") for expert in records["experts"]]
        build = digest_json({**named, "objects": digests})
        uri = f"{self.store.uri}#{self.recipe.name}"
        if not self.fresh and self.store.exists(manifest_key(build)):
            manifest = read_manifest(self.store, build)
            reference, moved = self._refer(build)
            return RunReport(uri, build, reference, False, moved, self.computed, self.reused, self.bytes_read, manifest)
        merged = add_inputs(self._run_tasks("merge", merge_tasks), describe_inputs(self.plan, survey, merge_tasks))
        copied = self._run_tasks("carry", copy_tasks)
        copied = [_label(entry, shard.name, shard.expert) for entry, shard in zip(copied, self.plan.copy_shards, strict=True)]
        for key, data in contents.items():
            self.store.put(key, data)
        manifest = self._make_manifest(build, records, [*merged, *copied])
        is_new = write_manifest(self.store, manifest)
        reference, moved = self._refer(build)
        return RunReport(uri, build, reference, is_new or self.fresh, moved, self.computed, self.reused, self.bytes_read, manifest)

    def _run_tasks(self, phase: str, tasks: Sequence[MergeTask | CopyTask]) -> list[ShardEntry]:
        """Return the entries of these tasks in their order, from the store where they were finished before."""
        found = {} if self.fresh else {task.digest: entry for task in tasks if (entry := read_entry(self.store, task.digest))}
        results = self._run_phase(phase, _unique(tasks), lambda task: task.digest in found)
        by_shard = {task.digest: results[task.shard].entry for task in tasks if task.shard in results}
        return [_label(found.get(task.digest) or by_shard[task.digest], task.shard, "") for task in tasks]

    def _read_files(self) -> tuple[dict[str, tuple[FileEntry, ...]], dict[str, bytes]]:
        """Return the small files of each checkpoint, and their contents by key."""
        listed: dict[str, tuple[FileEntry, ...]] = {}
        contents: dict[str, bytes] = {}
        for checkpoint in (self.base, *self.experts):
            entries = []
            for name, data in checkpoint.read_small_files().items():
                entry = FileEntry(name=name, num_bytes=len(data), digest=digest_bytes(data))
                contents[entry.key] = data
                entries.append(entry)
            listed[checkpoint.uri] = tuple(entries)
        return listed, contents

    def _make_records(self, survey: InputSurvey, files: dict[str, tuple[FileEntry, ...]]) -> dict[str, Any]:
        recipe = self.recipe
        base_files = files[recipe.base]
        experts = tuple(
            ExpertRecord(
                name=expert.name,
                modality=expert.modality,
                revision=survey.revision(index + 1, expert.name, files[expert.uri]),
                parameters=recipe.describe_parameters(expert.name),
                renames=self.plan.renames[index],
                source=_hub_source(expert.uri),
                placeholder=expert.placeholder,
                template=expert.template,
                rescaler=self.rescalers[index] if self.rescalers else None,
                adapters=self.plan.adapters[index] if self.plan.adapters else None,
                files=files[expert.uri],
            )
            for index, expert in enumerate(recipe.experts)
        )
        return {
            "kind": self.plan.kind,
            "method": recipe.method,
            "parameters": recipe.describe_parameters(),
            "merge": recipe.merge,
            "dtype": self.plan.dtype,
            "template": recipe.template,
            "base": BaseRecord(revision=survey.revision(0, "", base_files), source=_hub_source(recipe.base), files=base_files),
            "experts": experts,
        }

    def _make_manifest(self, build: str, records: dict[str, Any], entries: list[ShardEntry]) -> Manifest:
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
        sources = {"base": self.recipe.base} | {expert.name: expert.uri for expert in self.recipe.experts}
        versions = {name: version(name) for name in ("mmerge", "torch", "numpy", "pyarrow")} | {"python": platform.python_version()}
        return write_reference(self.store, self.recipe.name, build, sources=sources, versions=versions)


def _hub_source(uri: str) -> str | None:
    """Return the pinned URI of an input from the hub; other places are no part of a manifest."""
    return uri if uri.startswith("hf://") else None


def _unique(tasks: Sequence[MergeTask | CopyTask]) -> list[MergeTask | CopyTask]:
    """Return the tasks without those whose object another one writes as well."""
    return list({task.digest: task for task in reversed(tasks)}.values())[::-1]


def _label(entry: ShardEntry, shard: str, expert: str) -> ShardEntry:
    """Say to which shard and expert an entry belongs in this build: objects that builds share do not know."""
    return ShardEntry(
        object=entry.object.model_copy(update={"shard": shard, "expert": expert}),
        tensors=tuple(row.model_copy(update={"expert": expert or row.expert}) for row in entry.tensors),
    )
