"""The build of one shard, top to bottom: every step of a build that a reader must understand.

A shard is a generator. It yields the task that it needs next, or a barrier at which it waits for
other shards, and is resumed when that is done. `ShardBuilds` drives the generators: `mmerge run`
answers them through an executor, `mmerge plan` from the store, the simulator from rates.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from mmerge.manifests.format.entry import ShardEntry
from mmerge.pipeline.build.changed_inputs import ScanOutdated, is_replaced
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.build.shard_builds import Barrier, BuildTask, ShardBuild, ShardBuilds
from mmerge.pipeline.build.task_factory import (
    draft_merge_task,
    drop_checksums,
    make_copy_task,
    make_one_pass_task,
)
from mmerge.pipeline.build.threshold_search import Thresholds
from mmerge.pipeline.planning.shards import CopyShard, MergeShard
from mmerge.workers.checkpoints.input_digests import ChangedInput
from mmerge.workers.task import MergeDraft, OnePassTask, ScanTask
from mmerge.workers.tasks.scan_cache import ScanResult


def make_shard_builds(context: BuildContext) -> ShardBuilds:
    """Return the builds of all shards of a plan."""
    builds = {}
    for shard in context.plan.merge_shards:
        builds[shard.name] = build_merge_shard(context, shard)
    for copy_shard in context.plan.copy_shards:
        builds[copy_shard.name] = build_copy_shard(context, copy_shard)
    return ShardBuilds(builds)


def build_merge_shard(context: BuildContext, shard: MergeShard) -> ShardBuild:
    """Merge the tensors of one layer: scan, thresholds, stages of the method, merge.

    Where the run may read its inputs once, and the method needs nothing of them beforehand, scan
    and merge are one task. Otherwise, without a barrier, the merge follows the shard's own scan at
    once, and finds its inputs in the page cache even where the model is larger than memory.
    """
    scan_task = context.scan_tasks[shard.name]
    first_task: ScanTask | OnePassTask = scan_task
    if context.merges_in_one_pass(shard):
        draft = _draft_merge(context, shard, context.thresholds_without_search(shard))
        first_task = make_one_pass_task(scan_task, shard, draft)
    scan = yield from _scan(context, shard, scan_task, task=first_task)
    if shard.name in context.searches:
        context.searches[shard.name].add(shard, scan.histograms)
    del scan  # the histograms of all shards together may not fit into memory
    thresholds = yield from _find_thresholds(context, shard, scan_task)
    yield from _run_stages(context, shard, scan_task, thresholds)
    # After one pass its object is there already, under the digest of this task.
    merge_task = _draft_merge(context, shard, thresholds).complete(
        context.digests.of_tensors(shard.tensors), context.digests.checksums_of(shard.tensors)
    )
    entry: ShardEntry = yield from _read_again(context, shard, [scan_task], merge_task)
    return entry


def _draft_merge(context: BuildContext, shard: MergeShard, thresholds: Thresholds) -> MergeDraft:
    return draft_merge_task(
        context.plan,
        shard,
        thresholds=thresholds,
        earlier_results=context.stages.results_of(shard),
        fresh=context.fresh,
    )


def _scan(
    context: BuildContext,
    shard: MergeShard | CopyShard,
    scan_task: ScanTask,
    *,
    task: ScanTask | OnePassTask | None = None,
) -> Generator[BuildTask, Any, ScanResult]:
    """Scan the inputs of a shard, and add their digests to those of the build.

    With `task`, that task makes the scan.

    Raises:
        ScanOutdated: a file was replaced since the run began.
    """
    result: ScanResult | ChangedInput = yield task or scan_task
    if isinstance(result, ChangedInput):
        context.rescans.note(shard.name, result)
        raise ScanOutdated
    expert = shard.expert if isinstance(shard, CopyShard) else ""
    context.digests.add(scan_task, result, expert=expert)
    return result


def _read_again(
    context: BuildContext,
    shard: MergeShard | CopyShard,
    scan_tasks: Sequence[ScanTask],
    task: BuildTask,
) -> Generator[BuildTask, Any, Any]:
    """Run a task that reads what was scanned, and return its result.

    Where it read other bytes, the scans are repeated, and then the task; changed_inputs.py has the
    rules. From then on BLAKE3 is compared: the seeds of the checksums are those of the first scan,
    and an error names digests that other programs compute as well.

    Raises:
        ScanOutdated: the digests of the scans are no longer those of the inputs.
        CheckpointError: the inputs differ from their scan once more.
    """
    without_checksums = drop_checksums(task)
    if context.rescans.has(shard.name):
        task = without_checksums
    result = yield task
    if not isinstance(result, ChangedInput):
        return result
    context.rescans.note(shard.name, result)
    if any(is_replaced(scan_task) for scan_task in scan_tasks):
        raise ScanOutdated(scan_tasks)
    expert = shard.expert if isinstance(shard, CopyShard) else ""
    are_equal = True
    for scan_task in scan_tasks:
        scan: ScanResult | ChangedInput = yield replace(scan_task, fresh=True)
        if isinstance(scan, ChangedInput):
            raise ScanOutdated(scan_tasks)
        are_equal &= context.digests.has_equal(scan_task, scan, expert=expert)
        del scan
    if not are_equal:
        context.rescans.distrust(result)
        raise ScanOutdated
    result = yield without_checksums
    if isinstance(result, ChangedInput):
        context.rescans.note(shard.name, result)
    return result


def _find_thresholds(
    context: BuildContext, shard: MergeShard, scan_task: ScanTask
) -> Generator[BuildTask | Barrier, Any, Thresholds]:
    """Return the trim thresholds of a shard, after a second pass where the scans leave them open.

    All shards wait for each other where thresholds span the model, and those that hold rows of the
    same tensor where they span a tensor.
    """
    search = context.searches.get(shard.name)
    if search is None:
        return context.thresholds_without_search(shard)
    yield search.located
    if search.is_exact:
        return search.thresholds(shard)
    refine_task = search.make_refine_task(scan_task, context.digests)
    if refine_task is not None:
        refined: ScanResult = yield from _read_again(context, shard, [scan_task], refine_task)
        search.add_refined(shard, refined.histograms)
        del refined
    yield search.refined
    return search.thresholds(shard)


def _run_stages(
    context: BuildContext, shard: MergeShard, scan_task: ScanTask, thresholds: Thresholds
) -> Generator[BuildTask | Barrier, Any, None]:
    """Run the statistics passes of the method; each stage sees the results of those before it."""
    for stage_pass in context.stages.passes_of(shard):
        task = stage_pass.make_task(shard, scan_task, thresholds)
        counts: ScanResult = yield from _read_again(context, shard, [scan_task], task)
        stage_pass.add(shard, counts)
        del counts
        yield stage_pass.measured
        if stage_pass.stage.measures != "ranks":
            continue
        task = stage_pass.make_exact_task(shard, scan_task, thresholds)
        exact_counts: ScanResult = yield from _read_again(context, shard, [scan_task], task)
        stage_pass.add_exact(shard, exact_counts)
        del exact_counts
        yield stage_pass.resolved


def build_copy_shard(context: BuildContext, shard: CopyShard) -> ShardBuild:
    """Copy tensors of the base or of one expert, once all of them are scanned."""
    scan_tasks = context.scans_of(shard)
    for scan_task in scan_tasks:
        # A tensor of the base that is merged as well is scanned once, with its merge shard.
        if not context.digests.has(scan_task, expert=shard.expert):
            yield from _scan(context, shard, scan_task)
    copy_task = make_copy_task(context.plan, shard, context.digests, fresh=context.fresh)
    entry: ShardEntry = yield from _read_again(context, shard, scan_tasks, copy_task)
    return entry
