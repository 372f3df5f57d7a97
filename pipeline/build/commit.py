"""The end of a build: its digest, its small files, its table, its manifest and its reference."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.format.entry import ShardEntry
from mmerge.manifests.format.identity import make_build_digest
from mmerge.manifests.format.manifest import Manifest, TableEntry, write_manifest
from mmerge.manifests.format.references import Reference, write_reference
from mmerge.manifests.format.table import make_table
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.build.manifest_records import make_records, read_files
from mmerge.pipeline.build.provenance import add_inputs, describe_inputs
from mmerge.pipeline.build.shard_builds import ShardBuilds
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.task import CopyTask, MergeTask


@dataclass(frozen=True)
class BuildRecords:
    """A build whose tasks are all decided: its digest, and its manifest without entries."""

    build: str
    """The digest of the build."""
    fields: dict[str, Any]
    """The manifest's fields that describe recipe, base and experts."""
    small_files: dict[str, bytes]
    """By key: configurations, tokenizers, processors."""
    merge_tasks: tuple[MergeTask, ...]
    copy_tasks: tuple[CopyTask, ...]


def make_build_records(context: BuildContext, builds: ShardBuilds) -> BuildRecords:
    """Return the records of a build, once each shard has reached its last task."""
    plan = context.plan
    merge_tasks = [builds.final_tasks[shard.name] for shard in plan.merge_shards]
    copy_tasks = [builds.final_tasks[shard.name] for shard in plan.copy_shards]
    listed, contents = read_files(plan.checkpoints)
    fields = make_records(plan, context.digests, listed, context.stages.rescalers())
    objects = [task.digest for task in (*merge_tasks, *copy_tasks)]
    return BuildRecords(
        build=make_build_digest(fields, objects),
        fields=fields,
        small_files=contents,
        merge_tasks=tuple(task for task in merge_tasks if isinstance(task, MergeTask)),
        copy_tasks=tuple(task for task in copy_tasks if isinstance(task, CopyTask)),
    )


def commit_build(
    store: Store, context: BuildContext, builds: ShardBuilds, records: BuildRecords
) -> tuple[Manifest, bool]:
    """Write the small files, the table and, last, the manifest of a build.

    Returns:
        The manifest, and whether it is new: False where another run committed the same build.
    """
    plan = context.plan
    merged = [_label(builds.entries[shard.name], shard.name, "") for shard in plan.merge_shards]
    merged = add_inputs(merged, describe_inputs(plan, context.digests, records.merge_tasks))
    copied = [
        _label(builds.entries[shard.name], shard.name, shard.expert) for shard in plan.copy_shards
    ]
    for key, data in records.small_files.items():
        store.put(key, data)
    entries = [*merged, *copied]
    table = make_table(entries)
    table_key = f"builds/{records.build}/tensors.parquet"
    store.put(table_key, table)
    manifest = Manifest(
        build=records.build,
        entries=tuple(entry.object for entry in entries),
        table=TableEntry(key=table_key, num_bytes=len(table), digest=digest_bytes(table)),
        **records.fields,
    )
    return manifest, write_manifest(store, manifest)


def refer_to_build(store: Store, plan: MergePlan, build: str) -> tuple[Reference, bool]:
    """Let the recipe's name refer to a build; returns the reference, and whether it is new."""
    recipe = plan.recipe
    sources = {"base": recipe.base} | {expert.name: expert.uri for expert in recipe.experts}
    versions = {name: version(name) for name in ("mmerge", "torch", "numpy", "pyarrow")}
    versions["python"] = platform.python_version()
    return write_reference(store, recipe.name, build, sources=sources, versions=versions)


def _label(entry: ShardEntry, shard: str, expert: str) -> ShardEntry:
    """Return an entry with its shard and expert in this build, which shared objects lack."""
    rows: Sequence[Any] = entry.tensors
    return ShardEntry(
        object=entry.object.model_copy(update={"shard": shard, "expert": expert}),
        tensors=tuple(row.model_copy(update={"expert": expert or row.expert}) for row in rows),
    )
