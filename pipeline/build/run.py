"""Run a plan: one executor run over the builds of all shards, then the manifest, last and once."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mmerge.manifests.errors import MissingObjects, MmergeError, TaskErrors
from mmerge.manifests.format.entry import ShardEntry, find_entry
from mmerge.manifests.format.manifest import Manifest, read_manifest
from mmerge.manifests.format.references import Reference
from mmerge.manifests.format.stored_objects import find_object_damage
from mmerge.manifests.maintenance.check_build import find_committed_damages, run_reads
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.create_check import check_store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.build.changed_inputs import Rescans
from mmerge.pipeline.build.commit import (
    BuildRecords,
    commit_build,
    describe_difference,
    find_provenance_damages,
    make_build_records,
    refer_to_build,
)
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.build.shard import make_shard_builds
from mmerge.pipeline.build.shard_builds import BuildTask, FinalTask, OnePassResult
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.pipeline.planning.plan import MergePlan, check_plan
from mmerge.workers.task import OnePassTask, Task, TaskResult
from mmerge.workers.tasks.scan_cache import read_scan, scan_key

log = logging.getLogger("mmerge.run")
SAMPLE_BYTES = 256 << 20
"""Bytes of reused objects that a new build reads and compares: about a second of reading."""


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
    """Computed shards per phase."""
    num_reused: dict[str, int] = field(default_factory=dict)
    """Shards per phase that were there already."""
    bytes_read: int = 0
    manifest: Manifest | None = None
    is_compared: bool = False
    """Whether everything was computed again, and found equal to a build that was there."""
    repaired: tuple[str, ...] = ()
    """Keys of the build that were missing or damaged, and were written again."""


def run(
    plan: MergePlan,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
    verify_reused: bool = False,
    one_pass: bool = False,
) -> RunReport:
    """Build the composite of a plan and return what was done; a killed run continues where it was.

    Args:
        plan: from `make_plan`.
        executor: where tasks run; in this process if absent.
        progress: is shown every shard; log lines if absent.
        fresh: compute everything again, and compare it with what the store has: that is never
            replaced, except what is missing or damaged.
        verify_reused: read every object that is reused and compare its digest; one that is damaged
            is computed again. Without it, existence and size are compared, and the digests of a
            sample.
        one_pass: read each input once where the method allows that. A read that goes wrong is then
            noticed only if the file's identity changes: there is no second one to compare with.

    Raises:
        BuildDiffers: the store has this build, or some of its objects, with another result.
        StoreError: the store cannot be written.
        NonFiniteError: an input holds NaN or Inf.
        TaskErrors: several tasks failed; all others were finished and are kept.
    """
    executor, progress = executor or SerialExecutor(), progress or LogProgress()
    store = open_store(plan.recipe.output, create=True)
    check_store(store)
    rescans = Rescans(plan)
    with Lease(store, "run") as lease:
        lease.wait_for_none("collect")

        def make_run() -> _Run:
            context = BuildContext(plan, fresh=fresh, one_pass=one_pass, rescans=rescans)
            return _Run(context, executor, progress, verify_reused=verify_reused, lease=lease)

        def run_passes() -> RunReport:
            build_run = make_run()
            while (report := build_run.run()) is None:
                log.warning("inputs changed: going through the build again; what did not is kept")
                build_run = make_run().continue_from(build_run)
            return report

        try:
            return run_passes()
        except MissingObjects as missing:
            log.warning(
                "%s: %s: deleted while this run was suspended: the run continues with what is left",
                store.uri,
                missing.keys[0],
            )
        return run_passes()


class _Run:
    """One run of a plan."""

    def __init__(
        self,
        context: BuildContext,
        executor: Executor,
        progress: Progress,
        *,
        verify_reused: bool,
        lease: Lease,
    ) -> None:
        self.context, self.plan = context, context.plan
        self.executor, self.progress = executor, progress
        self.fresh, self.verify_reused = context.fresh, verify_reused
        self.lease, self.store = lease, lease.store
        if context.identities != self.plan.identities:
            check_plan(self.plan)
        self.builds = make_shard_builds(self.context)
        self.failures: list[Exception] = []
        self.bytes_read = 0
        self.num_computed = dict.fromkeys(self.context.phases, 0)
        self.num_reused = dict.fromkeys(self.context.phases, 0)
        self.announced: set[str] = set()
        """Final phases whose totals have been shown: they are known from the plan."""
        self.records: BuildRecords | None = None
        """Set once all shards have reached their last task."""
        self.is_committed = False
        """Whether the store had this very build by then, whole: its manifest is written last."""
        self._sampled: dict[str, bool] = {}
        """By digest of a task, whether its object is read before it is reused."""
        self.suspects: set[str] = set()
        """Digests of tasks whose object or entry contradicts the committed build."""
        self.differing: dict[str, tuple[str, ...]] = {}
        """By shard, the tensors that were computed again with another result."""
        self.repaired: list[str] = []

    def continue_from(self, earlier: _Run) -> _Run:
        """Return this pass with what an earlier one has computed in its counts."""
        self.num_computed, self.bytes_read = earlier.num_computed, earlier.bytes_read
        self.repaired = earlier.repaired
        return self

    def run(self) -> RunReport | None:
        """Return the finished build, None where inputs changed and another pass is needed.

        The store is known to be writable, and leased.
        """
        tasks = self.builds.start(self._find_statistics)
        self._note_records()
        if not self.is_committed:
            self._run_tasks(self._take_from_store(tasks))
        if self.failures:
            self._raise_failures()
        if self.builds.outdated_scans:
            self._delete_scans()
            return None
        if self.records is None or not (self.is_committed or self.builds.is_finished):
            raise MmergeError(
                f"{type(self.executor).__name__} ended before all shards were built. An executor"
                " must run the tasks that 'follow' returns"
            )
        if self.is_committed:
            return self._report(read_manifest(self.store, self.records.build), is_new=False)
        if self.differing:
            raise describe_difference(self.store, self.records, self.differing)
        publication = commit_build(self.lease, self.context, self.builds, self.records)
        self.repaired += publication.repaired
        return self._report(publication.manifest, is_new=publication.is_new)

    def _delete_scans(self) -> None:
        """Delete the scans that are true of no file: it was replaced while it was read."""
        for scans in self.builds.outdated_scans.values():
            for scan in scans:
                self.store.delete(scan_key(scan.key))

    def _find_statistics(self, task: BuildTask) -> Any:
        """Return what an earlier run left of a scan, of refined thresholds or of a stage."""
        if task.fresh or isinstance(task, FinalTask):
            return None
        scan = read_scan(self.store, task.key)
        if scan is not None:
            self.num_reused["scan" if isinstance(task, OnePassTask) else task.phase] += 1
        return scan

    def _take_from_store(self, tasks: Sequence[BuildTask]) -> list[BuildTask]:
        """Finish the shards whose objects are in the store; return the tasks that are left."""
        remaining = []
        finds = [partial(self._find_finished, task) for task in tasks]
        for task, entry in zip(tasks, run_reads(self.store, finds), strict=True):
            if entry is None:
                remaining.append(task)
                continue
            num_finished = len(self.builds.finished)
            self.builds.follow(task, entry)
            self.num_reused[task.phase] += len(self.builds.finished) - num_finished
        self._show_start(remaining)
        return remaining

    def _find_finished(self, task: BuildTask) -> ShardEntry | None:
        """Return the entry of a task whose object is there; a worker repairs any other."""
        if not isinstance(task, FinalTask) or self.fresh or self.verify_reused:
            return None
        if task.digest in self.suspects:
            return None
        entry = find_entry(self.store, task.digest)
        # Entries of version 0.1 have no checksum: a worker compares them with their objects, once.
        if entry is None or entry.checksum is None:
            return None
        is_read = self._is_sampled(task)
        return None if find_object_damage(self.store, entry.object, read=is_read) else entry

    def _is_sampled(self, task: FinalTask) -> bool:
        """Return whether a stored object of this task is read before it is reused.

        The sample is random and has about `SAMPLE_BYTES`, which is all of a small build.
        """
        if task.digest not in self._sampled:
            share = SAMPLE_BYTES / max(self.plan.bytes_out, 1)
            self._sampled[task.digest] = random.random() < share
        return self._sampled[task.digest]

    def _prepare(self, tasks: Sequence[BuildTask]) -> list[BuildTask]:
        """Return the tasks in the order in which they run, told what to verify."""
        prepared: list[BuildTask] = []
        for task in tasks:
            if isinstance(task, FinalTask):
                prepared.append(
                    replace(
                        task,
                        fresh=task.fresh or task.digest in self.suspects,
                        verify_reused=self.verify_reused or self._is_sampled(task),
                    )
                )
            else:
                prepared.append(task)
        # The largest first: a large task that begins last would run alone at the end.
        return sorted(prepared, key=lambda task: -task.num_bytes)

    def _run_tasks(self, tasks: Sequence[BuildTask]) -> None:
        """Run these tasks and those that follow from them; collect all failures."""
        with closing(
            self.executor.run(self._prepare(tasks), self.store.uri, self._follow)
        ) as outcomes:
            for task, outcome in outcomes:
                if isinstance(outcome, TaskResult):
                    if isinstance(task, OnePassTask) and outcome.entry is None:
                        # It found its scan in the store: the merge task of that counts.
                        continue
                    if outcome.changed_input is None:
                        self._count(task.phase, outcome)
                else:
                    self.failures.append(outcome)
                    self.progress.fail(task.phase, task.shard, outcome)

    def _follow(self, task: Task, result: TaskResult) -> Sequence[Task]:
        """Return the tasks that follow from one that has ended; none after a failure."""
        if self.failures or not isinstance(task, BuildTask):
            return ()
        num_finished = len(self.builds.finished)
        followers = self.builds.follow(task, self._read_result(task, result))
        self._note_records()
        if self.is_committed:
            return ()
        self._show_followers(followers)
        for shard in self.builds.finished[num_finished:]:
            if shard != task.shard:
                # Another shard has the same object: experts that share an encoder, say.
                phase = self.builds.final_tasks[shard].phase
                self._count(phase, TaskResult(shard, 0, True, 0.0))
        return self._prepare(followers)

    def _read_result(self, task: BuildTask, result: TaskResult) -> Any:
        if result.changed_input is not None:
            return result.changed_input
        if result.differing:
            self.differing[task.shard] = result.differing
        self.repaired += result.repaired
        if isinstance(task, FinalTask):
            return result.entry
        scan = read_scan(self.store, task.key)
        if scan is None:
            raise MmergeError(
                f"{self.store.uri}: the {task.phase} result of {task.shard} is damaged or gone."
                " 'mmerge run RECIPE' computes it again"
            )
        return scan if result.entry is None else OnePassResult(scan, result.entry)

    def _note_records(self) -> None:
        """Name the build as soon as the last tasks of all shards are known."""
        if self.records is not None or len(self.builds.final_tasks) < self.builds.num_shards:
            return
        self.records = make_build_records(self.context, self.builds)
        self.progress.name_build(self.records.build)
        if self.fresh or self.verify_reused:
            return
        damages = find_committed_damages(self.store, self.records.build)
        if damages is None:
            return
        damages = damages or find_provenance_damages(self.store, self.context, self.records)
        for damage in damages:
            log.warning("%s: %s. It is compared and written again", self.store.uri, damage.sentence)
        self.suspects = {damage.object_digest for damage in damages}
        self.is_committed = not damages

    def _show_start(self, tasks: Sequence[BuildTask]) -> None:
        """Show the phases that have work or results at the start."""
        for phase in self.context.phases:
            waiting = [task for task in tasks if task.phase == phase]
            if phase in ("merge", "copy"):
                if waiting or self.num_reused[phase]:
                    self._announce(phase)
            elif waiting or self.num_reused[phase]:
                self._begin(phase, waiting, self.num_reused[phase])

    def _show_followers(self, tasks: Sequence[BuildTask]) -> None:
        for phase in dict.fromkeys(task.phase for task in tasks):
            if phase in ("merge", "copy"):
                self._announce(phase)
            else:
                self._begin(phase, [task for task in tasks if task.phase == phase], 0)

    def _announce(self, phase: str) -> None:
        """Show a final phase with all of its shards, when the first of them begins."""
        if phase in self.announced:
            return
        self.announced.add(phase)
        sizes = {shard.name: shard.bytes_in for shard in self.plan.merge_shards}
        if phase == "copy":
            sizes = {shard.name: shard.num_bytes for shard in self.plan.copy_shards}
        remaining = [size for name, size in sizes.items() if name not in self.builds.entries]
        self.progress.begin(
            phase,
            num_bytes=sum(remaining),
            num_tasks=len(remaining),
            num_reused=len(sizes) - len(remaining),
        )

    def _begin(self, phase: str, tasks: Sequence[BuildTask], num_reused: int) -> None:
        num_bytes = sum(task.num_bytes for task in tasks)
        self.progress.begin(phase, num_bytes=num_bytes, num_tasks=len(tasks), num_reused=num_reused)

    def _count(self, phase: str, result: TaskResult) -> None:
        counts = self.num_reused if result.reused else self.num_computed
        counts[phase] += 1
        self.bytes_read += result.num_bytes
        self.progress.advance(phase, result)

    def _raise_failures(self) -> None:
        if len(self.failures) == 1:
            raise self.failures[0]
        raise TaskErrors(sorted(str(failure) for failure in self.failures))

    def _report(self, manifest: Manifest, *, is_new: bool) -> RunReport:
        reference, moved = refer_to_build(self.lease, self.plan, manifest)
        return RunReport(
            uri=f"{self.store.uri}#{self.plan.recipe.name}",
            build=manifest.build,
            reference=reference,
            is_new=is_new,
            moved=moved,
            num_computed=self.num_computed,
            num_reused=self.num_reused,
            bytes_read=self.bytes_read,
            manifest=manifest,
            is_compared=self.fresh and not is_new,
            repaired=tuple(dict.fromkeys(self.repaired)),
        )
