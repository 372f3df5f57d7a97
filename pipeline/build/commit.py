"""The end of a build: its digest, its small files, its table, its manifest and its reference."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import BuildDiffers
from mmerge.manifests.format.entry import ShardEntry, object_key
from mmerge.manifests.format.files import put_file
from mmerge.manifests.format.identity import make_build_digest
from mmerge.manifests.format.manifest import (
    Manifest,
    WarningsRecord,
    manifest_key,
    read_manifest,
)
from mmerge.manifests.format.publish import Publication, make_table_entry
from mmerge.manifests.format.references import Reference
from mmerge.manifests.format.stored_objects import find_listings
from mmerge.manifests.format.table import make_table
from mmerge.manifests.maintenance.damage import Damage
from mmerge.manifests.maintenance.fenced_commit import FencedCommit
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.base import Store
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.build.manifest_records import describe_warnings, make_records, read_files
from mmerge.pipeline.build.provenance import add_inputs, describe_inputs
from mmerge.pipeline.build.shard_builds import ShardBuilds
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.task import CopyTask, MergeTask

NAMED_TENSORS = 5
"""Tensors of a shard that a message names."""


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
    lease: Lease, context: BuildContext, builds: ShardBuilds, records: BuildRecords
) -> Publication:
    """Write the small files, the table and, last, the manifest of a build.

    A build that another run committed meanwhile stays as it is.

    Raises:
        BuildDiffers: the store has this build with another result.
    """
    plan = context.plan
    merged = [_label(builds.entries[shard.name], shard.name, "") for shard in plan.merge_shards]
    merged = add_inputs(merged, describe_inputs(plan, context.digests, records.merge_tasks))
    copied = [
        _label(builds.entries[shard.name], shard.name, shard.expert) for shard in plan.copy_shards
    ]
    written_files = [
        key
        for key, data in records.small_files.items()
        if put_file(lease.store, key, data) != "present"
    ]
    entries = [*merged, *copied]
    table = make_table(entries)
    manifest = Manifest(
        build=records.build,
        entries=tuple(entry.object for entry in entries),
        table=make_table_entry(records.build, table),
        warnings=WarningsRecord.make(describe_warnings(plan)),
        **records.fields,
    )
    publication = FencedCommit(lease, manifest).publish(table)
    if not publication.is_new:
        publication.repaired[:0] = written_files
    return publication


def find_provenance_damages(
    store: Store, context: BuildContext, records: BuildRecords
) -> list[Damage]:
    """Return how the provenance of a committed build differs from that of this run.

    The digest of the build does not cover it, and a new reference would confirm an edit of it.
    """
    manifest = read_manifest(store, records.build)
    inputs = describe_inputs(context.plan, context.digests, records.merge_tasks)
    key = manifest_key(records.build)
    return [
        Damage(key, f"{key}: {entry.shard}: 'inputs' differ from those of the recipe")
        for entry in manifest.entries
        if entry.inputs != inputs.get(entry.shard)
    ]


def describe_difference(
    store: Store, records: BuildRecords, differing: Mapping[str, Sequence[str]]
) -> BuildDiffers:
    """Return the error of a run that computed stored objects again with another result.

    Args:
        store: the store; nothing in it was replaced.
        records: the build of the run.
        differing: by shard, the tensors that differ.
    """
    digests = {task.shard: task.digest for task in records.merge_tasks}
    digests |= {task.shard: task.digest for task in records.copy_tasks}
    lines = []
    builds: set[str] = set()
    for shard, tensors in sorted(differing.items()):
        named = ", ".join(tensors[:NAMED_TENSORS])
        more = f" and {len(tensors) - NAMED_TENSORS} more" if len(tensors) > NAMED_TENSORS else ""
        lines.append(f"  {shard}: {named}{more}")
        key = object_key(digests[shard])
        builds |= {listing.build for listing in find_listings(store, key)}
    if builds:
        commands = " and ".join(
            f"'mmerge delete {store.uri}#{build[:SHOWN_DIGITS]} --objects --yes'"
            for build in sorted(builds)
        )
    else:
        commands = f"'mmerge gc {store.uri} --delete --grace 0s'"
    noun = "shard" if len(lines) == 1 else "shards"
    return BuildDiffers(
        f"{store.uri}: {len(lines)} {noun} were computed with another result than the stored one:\n"
        + "\n".join(lines)
        + "\nNothing was replaced. Other versions of libraries, or another processor, may have made"
        f" the stored ones. To keep the new result: {commands}, then run the recipe again; or give"
        " it another 'output'"
    )


def refer_to_build(lease: Lease, plan: MergePlan, manifest: Manifest) -> tuple[Reference, bool]:
    """Let the recipe's name refer to a build; returns the reference, and whether it is new."""
    recipe = plan.recipe
    sources = {"base": recipe.base} | {expert.name: expert.uri for expert in recipe.experts}
    versions = {name: version(name) for name in ("mmerge", "torch", "numpy", "pyarrow")}
    versions["python"] = platform.python_version()
    commit = FencedCommit(lease, manifest)
    return commit.write_reference(recipe.name, sources=sources, versions=versions)


def _label(entry: ShardEntry, shard: str, expert: str) -> ShardEntry:
    """Return an entry with its shard and expert in this build, which shared objects lack."""
    rows: Sequence[Any] = entry.tensors
    return ShardEntry(
        object=entry.object.model_copy(update={"shard": shard, "expert": expert}),
        tensors=tuple(row.model_copy(update={"expert": expert or row.expert}) for row in rows),
    )
