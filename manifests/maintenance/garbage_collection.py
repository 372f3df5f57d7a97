"""Garbage collection: delete what no live build needs, after a grace period.

It never runs while a build run uses the store (lease.py). Order of steps:

1. write a lease; end if another process holds one;
2. mark: list the store, and read which keys no live build needs;
3. look again: end if another process holds a lease now, and mark a second time;
4. delete what was marked twice and did not change in between, while the lease is held
   (deletion.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.format.manifest import manifest_key, needed_keys
from mmerge.manifests.format.references import (
    LISTING_ATTEMPTS,
    Reference,
    list_references,
    parse_reference_key,
    read_reference,
    reference_key,
)
from mmerge.manifests.maintenance.deletion import delete_keys
from mmerge.manifests.maintenance.lease import (
    ANNOUNCEMENT_LIFE,
    STALE,
    Claims,
    Lease,
    Timing,
    read_announced_keys,
)
from mmerge.manifests.maintenance.manifest_checks import read_consistent_manifest
from mmerge.manifests.stores.base import Listed, ReadableStore, Store

DEFAULT_GRACE = timedelta(days=7)


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
        grace = self.grace
        if listed.key.startswith("probe/"):
            # A run that checks the store has no lease yet: it would find its own objects missing.
            grace = max(grace, STALE)
        if listed.key.startswith("claims/"):
            is_announcement = listed.key.startswith("claims/commit-")
            grace = max(grace, ANNOUNCEMENT_LIFE if is_announcement else STALE)
        return self.now - listed.modified > grace


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
    timing: Timing | None = None,
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
        timing: clock and names of the lease, replaced in tests.

    Raises:
        StoreError: a run or another collection is using the store, or this collection was suspended
            for so long that one may have begun to.
        ManifestError: a manifest cannot be read, so that what it needs is unknown.
    """
    if keep < 1:
        raise StoreError(
            f"--keep: expected 1 or more, got {keep}: the newest build of a name always stays"
        )
    if not delete:
        listing = list(store.list_objects())
        now = _latest_time(listing)
        claims = Claims(
            {listed.key: listed.modified for listed in listing if listed.key.startswith("claims/")},
            now,
        )
        return _find_garbage(store, listing, _Policy(now, grace, keep, scans), claims)
    with Lease(store, "collect", timing=timing) as lease:
        marked = _mark(lease, grace=grace, keep=keep, scans=scans)
        report = _mark(lease, grace=grace, keep=keep, scans=scans)
        # A time that changed says that somebody has written the object meanwhile.
        marked_before = set(marked.garbage)
        garbage = tuple(listed for listed in report.garbage if listed in marked_before)
        delete_keys(lease, [listed.key for listed in garbage])
    return replace(report, garbage=garbage, deleted=True)


def _mark(lease: Lease, *, grace: timedelta, keep: int, scans: bool) -> GarbageReport:
    """Return what is garbage now. Raises StoreError if another process holds a lease."""
    lease.renew()
    claims = lease.read_idle_claims()
    listing = [listed for listed in lease.store.list_objects() if listed.key != lease.key]
    return _find_garbage(lease.store, listing, _Policy(claims.now, grace, keep, scans), claims)


def _find_garbage(
    store: Store, listing: list[Listed], policy: _Policy, claims: Claims
) -> GarbageReport:
    """Return what is garbage in a listing that is younger than `claims`."""
    live = _find_live(store, listing, policy, announced=read_announced_keys(store, claims))
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


def _find_live(
    store: ReadableStore, listing: list[Listed], policy: _Policy, *, announced: Iterable[str]
) -> _Live:
    young = {listed.key for listed in listing if not policy.is_old(listed)}
    keys = set(announced)
    builds = {key.split("/")[1] for key in keys if key.startswith("builds/")}
    for reference in _read_live_references(store, policy, young):
        keys.add(reference.key)
        builds.add(reference.build)
    for key in young:
        parts = key.split("/")
        if len(parts) == 3 and parts[0] == "builds" and key == manifest_key(parts[1]):
            builds.add(parts[1])
    stored_keys = {listed.key for listed in listing}
    for build in sorted(builds):
        if manifest_key(build) in stored_keys:
            keys |= needed_keys(read_consistent_manifest(store, build))
    return _Live(frozenset(keys), frozenset(builds))


def _read_live_references(
    store: ReadableStore, policy: _Policy, young: set[str]
) -> list[Reference]:
    """Return the newest references of each name, and the young ones.

    They are listed again if one is deleted before it is read: another number is the newest then.
    """
    for _ in range(LISTING_ATTEMPTS):
        with suppress(NotFound):
            return [
                read_reference(store, name, number)
                for name, numbers in list_references(store).items()
                for number in numbers
                if number in numbers[-policy.keep :] or reference_key(name, number) in young
            ]
    raise StoreError(
        f"{store.uri}: references are deleted while they are read: nothing was deleted here. Try"
        " again when no other 'mmerge delete' or 'mmerge gc' is under way"
    )


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
