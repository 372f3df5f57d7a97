"""Garbage collection: delete what no live build needs, after a grace period.

It never runs while a build run uses the store (lease.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from mmerge.manifests.errors import StoreError
from mmerge.manifests.format.manifest import Manifest, manifest_key, read_manifest
from mmerge.manifests.format.references import (
    delete_reference,
    list_references,
    parse_reference_key,
    read_reference,
    reference_key,
)
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.stores.base import Listed, ReadableStore, Store

DEFAULT_GRACE = timedelta(days=7)
_DELETION_ORDER = ("builds/", "objects/", "files/", "surveys/", "probe/", "claims/")
"""What names an object is deleted before the object: a killed collection leaves no dangling name.
References go first, one by one.
"""
_CONCURRENT_DELETES = 8


@dataclass(frozen=True)
class GarbageReport:
    """What a garbage collection deletes, or would delete, and what it keeps."""

    uri: str
    garbage: tuple[Listed, ...]
    live_builds: tuple[str, ...]
    dead_builds: tuple[str, ...]
    num_kept: int
    kept_bytes: int
    deleted: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of the garbage."""
        return sum(listed.num_bytes for listed in self.garbage)


@dataclass(frozen=True)
class _Policy:
    """What counts as garbage: see `collect_garbage`."""

    now: datetime
    grace: timedelta
    keep: int
    scans: bool

    def is_old(self, listed: Listed) -> bool:
        return self.now - listed.modified > self.grace


@dataclass(frozen=True)
class _Live:
    """Keys and builds that must stay."""

    keys: frozenset[str]
    builds: frozenset[str]


def collect_garbage(
    store: Store,
    *,
    grace: timedelta = DEFAULT_GRACE,
    keep: int = 1,
    scans: bool = False,
    delete: bool = False,
) -> GarbageReport:
    """Return what is garbage in a store, and delete it if `delete` is set.

    A build is live while one of the `keep` newest numbers of a name, or any reference younger than
    `grace`, points to it, or while its manifest is younger than `grace`. An object is garbage when
    no live build names it and it was written longer than `grace` ago, so that a killed run can
    continue from what it finished.

    Args:
        store: the store.
        grace: the least age of garbage.
        keep: numbers of each name that stay at any age.
        scans: whether cached scans older than `grace` are garbage; the next run then reads its
            inputs again.
        delete: delete; otherwise only report.

    Raises:
        StoreError: a run or another collection is using the store.
        ManifestError: a manifest cannot be read, so that what it needs is unknown.
    """
    if keep < 1:
        raise StoreError(
            f"--keep: expected 1 or more, got {keep}: the newest build of a name always stays"
        )
    if not delete:
        listing = list(store.list_objects())
        policy = _Policy(_latest_time(listing), grace, keep, scans)
        return _find_garbage(store, listing, policy)
    with Lease(store, "collect") as lease:
        lease_keys = lease.find_others("run") + lease.find_others("collect")
        if lease_keys:
            raise StoreError(
                f"{store.uri}: in use by another process ({lease_keys[0]}): nothing was deleted."
                " Try again when it has ended"
            )
        listing = list(store.list_objects())
        # The lease was written a moment ago: its time is the present by the store's own clock.
        lease_times = [listed.modified for listed in listing if listed.key == lease.key]
        now = lease_times[0] if lease_times else _latest_time(listing)
        report = _find_garbage(store, listing, _Policy(now, grace, keep, scans))
        _delete(store, report.garbage, own_lease=lease.key)
    return replace(report, deleted=True)


def _delete(store: Store, garbage: Iterable[Listed], *, own_lease: str) -> None:
    keys = [listed.key for listed in garbage if listed.key != own_lease]
    for name, number in filter(None, map(parse_reference_key, keys)):
        delete_reference(store, name, number)
    for prefix in _DELETION_ORDER:
        below = [key for key in keys if key.startswith(prefix)]
        # The entry that says an object is complete goes before the object.
        entries = [key for key in below if key.endswith(".json")]
        objects = [key for key in below if not key.endswith(".json")]
        for group in (entries, objects):
            with ThreadPoolExecutor(_CONCURRENT_DELETES) as pool:
                list(pool.map(store.delete, group))
    for key in keys:
        if not key.startswith((*_DELETION_ORDER, "refs/")):
            store.delete(key)


def _find_garbage(store: Store, listing: list[Listed], policy: _Policy) -> GarbageReport:
    live = _find_live(store, listing, policy)
    garbage = [
        listed
        for listed in listing
        if policy.is_old(listed) and _may_be_deleted(listed.key, live, scans=policy.scans)
    ]
    partials = [listed for listed in store.list_partials() if policy.is_old(listed)]
    garbage_keys = {listed.key for listed in garbage}
    kept = [listed for listed in listing if listed.key not in garbage_keys]
    builds = {listed.key.split("/")[1] for listed in listing if listed.key.startswith("builds/")}
    return GarbageReport(
        uri=store.uri,
        garbage=tuple(sorted([*garbage, *partials], key=lambda listed: listed.key)),
        live_builds=tuple(sorted(live.builds)),
        dead_builds=tuple(sorted(builds - live.builds)),
        num_kept=len(kept),
        kept_bytes=sum(listed.num_bytes for listed in kept),
    )


def _latest_time(listing: list[Listed]) -> datetime:
    """Return the present by this machine's clock, or the newest time in the store if later."""
    here = datetime.now().astimezone()
    return max([here, *(listed.modified for listed in listing)])


def _find_live(store: ReadableStore, listing: list[Listed], policy: _Policy) -> _Live:
    young = {listed.key for listed in listing if not policy.is_old(listed)}
    keys: set[str] = set()
    builds: set[str] = set()
    for name, numbers in list_references(store).items():
        for number in numbers:
            key = reference_key(name, number)
            if number in numbers[-policy.keep :] or key in young:
                keys.add(key)
                builds.add(read_reference(store, name, number).build)
    for key in young:
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == "builds" and key == manifest_key(parts[1]):
            builds.add(parts[1])
    stored_keys = {listed.key for listed in listing}
    for build in sorted(builds):
        if manifest_key(build) in stored_keys:
            keys |= needed_keys(read_manifest(store, build))
    return _Live(frozenset(keys), frozenset(builds))


def needed_keys(manifest: Manifest) -> set[str]:
    """Return every key of a build, with the entries by which a later run finds its objects."""
    files = {file.key for file in manifest.unique_files()}
    objects = {entry.key for entry in manifest.entries}
    entries = {key.removesuffix(".safetensors") + ".json" for key in objects}
    return {manifest_key(manifest.build), manifest.table.key} | files | objects | entries


def _may_be_deleted(key: str, live: _Live, *, scans: bool) -> bool:
    if key in live.keys:
        return False
    folder = key.partition("/")[0]
    if folder == "builds":
        build = key.split("/")[1]
        # Of a live build only tables can be garbage: those that other builders of it wrote. Which
        # one it needs is unknown while its manifest is missing.
        is_table = key.endswith(".parquet")
        return build not in live.builds or (is_table and manifest_key(build) in live.keys)
    if folder == "surveys":
        return scans
    if folder == "refs":
        # The mark of a deleted number stays: it keeps the number from being used again.
        return parse_reference_key(key) is not None
    return folder in ("objects", "files", "probe", "claims")
