"""Publish a build: its table and its manifest are created once, and never replaced.

Another builder of the same build may write another table: Parquet files of equal rows differ
between versions of pyarrow. A table therefore lies under its own digest, so that both can lie side
by side, and the manifest that is created first decides which of them the build has. The other
builder reads that manifest back, and uses it if it says the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from mmerge.manifests.digest import SHOWN_DIGITS, digest_bytes
from mmerge.manifests.errors import (
    BuildDiffers,
    ManifestError,
    StoreError,
    StoreUnavailable,
    UnknownVersion,
)
from mmerge.manifests.format.files import put_file
from mmerge.manifests.format.identity import recompute_build_digest
from mmerge.manifests.format.manifest import (
    Manifest,
    TableEntry,
    manifest_key,
    read_manifest,
    to_manifest_bytes,
)
from mmerge.manifests.format.stored_objects import find_object_damage
from mmerge.manifests.format.table import StoredRow, parse_table, read_table, table_key
from mmerge.manifests.stores import confirm
from mmerge.manifests.stores.base import ReadableStore, Store

MAX_TABLE_BYTES = 1 << 30
_NAMED_CHANGES = 5

log = logging.getLogger("mmerge.store")


@dataclass
class Publication:
    """The result of publishing a build."""

    manifest: Manifest
    """The manifest in the store: this writer's own, or that of an earlier one."""
    is_new: bool
    """Whether this writer created it."""
    repaired: list[str] = field(default_factory=list)
    """Keys of a table or manifest that was missing or damaged, and was written again."""


def make_table_entry(build: str, table: bytes) -> TableEntry:
    """Return the entry of a build's table, whose key holds its digest."""
    digest = digest_bytes(table)
    return TableEntry(key=table_key(build, digest), num_bytes=len(table), digest=digest)


def publish_build(
    store: Store, manifest: Manifest, table: bytes, *, check: Callable[[], None] = lambda: None
) -> Publication:
    """Write the table and create the manifest of a build whose objects and files are in the store.

    An existing manifest of the build stays, and is returned, if it says the same: equal fields and
    entries, and equal rows in its table. A manifest or table that is damaged, or that contradicts
    the stored objects, is written again.

    Args:
        store: the store.
        manifest: the manifest of this writer.
        table: the table that it names.
        check: called immediately before a manifest is created; what it raises ends the call.

    Raises:
        BuildDiffers: the store has this build with another result.
    """
    key = manifest_key(manifest.build)
    if not store.exists(key):
        put_file(store, manifest.table.key, table)
        data = to_manifest_bytes(manifest)
        created = confirm.create(store, key, data, check=check)
        if created.data == data:
            return Publication(manifest, is_new=created.is_new)
    return _join(store, manifest, table)


def find_whole_manifest(store: ReadableStore, build: str) -> Manifest | None:
    """Return the manifest of a build, None if it is missing or damaged.

    Raises:
        UnknownVersion: another version of mmerge wrote it: it is not ours to judge.
    """
    try:
        manifest = read_manifest(store, build)
    except (StoreUnavailable, UnknownVersion):
        raise
    except (ManifestError, StoreError):
        return None
    return manifest if recompute_build_digest(manifest) == build else None


def check_same_build(store: ReadableStore, stored: Manifest, manifest: Manifest) -> None:
    """Compare the objects of two manifests of one build.

    Raises:
        BuildDiffers: an object in the store is what the stored manifest says, and not what the new
            one says. Where it is neither, nothing is lost.
    """
    stored_entries = {entry.key: entry for entry in stored.entries}
    changes = []
    for entry in manifest.entries:
        stored_entry = stored_entries.get(entry.key)
        if stored_entry is None or stored_entry.digest == entry.digest:
            continue
        if find_object_damage(store, stored_entry, read=True) is None:
            changes.append(f"shard {entry.shard}")
    if changes:
        raise _differ(store, manifest.build, changes)


def _join(store: Store, manifest: Manifest, table: bytes) -> Publication:
    """Return what is published of a build after comparing it with this manifest and table."""
    stored = find_whole_manifest(store, manifest.build)
    if stored is None:
        return _repair_manifest(store, manifest, table)
    check_same_build(store, stored, manifest)
    # Another version may have found other warnings: they stay, unless they are damaged.
    own = {"table": manifest.table, "warnings": manifest.warnings}
    is_whole = stored.warnings is None or stored.warnings.is_whole
    if not is_whole or stored.model_copy(update=own) != manifest:
        # The rest of a manifest follows from its build and from the stored objects.
        return _repair_manifest(store, manifest, table)
    try:
        stored_rows = read_table(store, stored.table)
    except StoreUnavailable:
        raise
    except ManifestError:
        if digest_bytes(table) != stored.table.digest or stored.table.num_bytes != len(table):
            return _repair_manifest(store, manifest, table)
        confirm.put(store, stored.table.key, table)
        log.warning("%s: %s was damaged or missing: repaired", store.uri, stored.table.key)
        return Publication(stored, is_new=False, repaired=[stored.table.key])
    if stored_rows != parse_table(table):
        # Equal objects have equal tensors: a table that says otherwise is damaged.
        return _repair_manifest(store, manifest, table)
    return Publication(stored, is_new=False)


def _repair_manifest(store: Store, manifest: Manifest, table: bytes) -> Publication:
    """Write a damaged manifest, or one whose table is damaged, again.

    It names the table that the build had, if that is found whole, and this writer's otherwise.
    """
    key = manifest_key(manifest.build)
    stored_table = _find_table(store, manifest.build, parse_table(table))
    repaired = [key]
    if stored_table is not None:
        manifest = manifest.model_copy(update={"table": stored_table})
    else:
        put_file(store, manifest.table.key, table)
        repaired.append(manifest.table.key)
    confirm.put(store, key, to_manifest_bytes(manifest))
    log.warning("%s: %s was damaged: repaired", store.uri, " and ".join(repaired))
    return Publication(read_manifest(store, manifest.build), is_new=False, repaired=repaired)


def _find_table(store: ReadableStore, build: str, rows: list[StoredRow]) -> TableEntry | None:
    """Return the whole table among those of a build that has these rows, None if there is none."""
    for key in sorted(store.list(f"builds/{build}")):
        if not key.endswith(".parquet"):
            continue
        try:
            data = store.read(key, max_bytes=MAX_TABLE_BYTES)
            entry = TableEntry(key=key, num_bytes=len(data), digest=digest_bytes(data))
            if read_table(store, entry) == rows:
                return entry
        except StoreUnavailable:
            raise
        except (ManifestError, StoreError, ValueError):
            continue
    return None


def _differ(store: ReadableStore, build: str, changes: list[str]) -> BuildDiffers:
    named = ", ".join(changes[:_NAMED_CHANGES])
    more = f" and {len(changes) - _NAMED_CHANGES} more" if len(changes) > _NAMED_CHANGES else ""
    return BuildDiffers(
        f"{store.uri}: build {build[:SHOWN_DIGITS]} is there with another result: {named}{more}"
        " differ. Nothing was replaced. To keep this one instead: 'mmerge delete"
        f" {store.uri}#{build[:SHOWN_DIGITS]} --objects --yes', then do this again; or choose"
        " another store"
    )
