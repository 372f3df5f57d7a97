"""Garbage collection: what no live build needs, after a grace period, and never while a run uses
the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from mmerge.manifests.errors import StoreError
from mmerge.manifests.format.manifest import Manifest, manifest_key, read_manifest
from mmerge.manifests.format.references import list_references, read_reference
from mmerge.manifests.maintenance.lease import Claim
from mmerge.manifests.stores.base import Listed, ReadableStore, Store

DEFAULT_GRACE = timedelta(days=7)
_ORDER = ("refs/", "builds/", "objects/", "files/", "surveys/", "probe/", "claims/")
"""What names something is deleted before what it names: a collection that is killed leaves nothing
that dangles.
"""
_DELETES_AT_ONCE = 8


@dataclass(frozen=True)
class Collection:
    """What a collection deletes (or would delete) and what it keeps."""

    uri: str
    garbage: tuple[Listed, ...]
    live_builds: tuple[str, ...]
    dead_builds: tuple[str, ...]
    num_kept: int
    kept_bytes: int
    deleted: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of what is deleted."""
        return sum(listed.num_bytes for listed in self.garbage)


@dataclass
class _Live:
    """Keys and builds that must stay."""

    keys: set[str] = field(default_factory=set)
    builds: set[str] = field(default_factory=set)


def collect(
    store: Store,
    *,
    grace: timedelta = DEFAULT_GRACE,
    keep: int = 1,
    surveys: bool = False,
    delete: bool = False,
) -> Collection:
    """Return what is garbage in a store, and delete it if `delete` is set.

    A build is live while one of the `keep` newest numbers of a name, or any reference younger than
    `grace`, points to it, or while its manifest is younger than `grace`. An object is garbage when
    no live build names it and it was written longer than `grace` ago: so a killed run finds what it
    finished.

    Args:
        store: what to look through.
        grace: how long everything stays at least.
        keep: numbers of each name that stay whatever their age.
        surveys: whether cached surveys older than `grace` are garbage as well; the next run then
            reads its inputs again.
        delete: delete; otherwise only say what would be.

    Raises:
        StoreError: a run is using the store, or another collection.
        ManifestError: a manifest cannot be read, so that nobody knows what it needs.
    """
    if keep < 1:
        raise StoreError(
            f"--keep: expected 1 or more, got {keep}: the newest build of a name always stays"
        )
    if not delete:
        everything = list(store.list_objects())
        return _find_garbage(
            store, everything, now=_now(everything), grace=grace, keep=keep, surveys=surveys
        )
    with Claim(store, "collect") as claim:
        if others := claim.find_others("run") + claim.find_others("collect"):
            raise StoreError(
                f"{store.uri}: in use by another process ({others[0]}): nothing was deleted. Try"
                " again when it has ended"
            )
        everything = list(store.list_objects())
        # The claim was written a moment ago: its time is now by the store's own clock.
        now = next(
            (listed.modified for listed in everything if listed.key == claim.key), _now(everything)
        )
        found = _find_garbage(store, everything, now=now, grace=grace, keep=keep, surveys=surveys)
        _delete(store, found.garbage, claim=claim)
    return Collection(**(vars(found) | {"deleted": True}))


def _delete(store: Store, garbage: Iterable[Listed], *, claim: Claim) -> None:
    for prefix in _ORDER:
        keys = [
            listed.key
            for listed in garbage
            if listed.key.startswith(prefix) and listed.key != claim.key
        ]
        # The entry that says an object is complete goes before the object.
        for group in (
            [key for key in keys if key.endswith(".json")],
            [key for key in keys if not key.endswith(".json")],
        ):
            with ThreadPoolExecutor(_DELETES_AT_ONCE) as pool:
                list(pool.map(store.delete, group))
    for listed in garbage:
        if not listed.key.startswith(_ORDER):
            store.delete(listed.key)


def _find_garbage(
    store: Store,
    everything: list[Listed],
    *,
    now: datetime,
    grace: timedelta,
    keep: int,
    surveys: bool,
) -> Collection:
    old = {listed.key for listed in everything if now - listed.modified > grace}
    live = _find_live(store, everything, old, keep=keep)
    garbage = [
        listed
        for listed in everything
        if listed.key in old and _may_go(listed.key, live, surveys=surveys)
    ]
    partials = [listed for listed in store.list_partials() if now - listed.modified > grace]
    gone = {listed.key for listed in garbage}
    all_builds = {
        key.split("/")[1] for listed in everything if (key := listed.key).startswith("builds/")
    }
    kept = [listed for listed in everything if listed.key not in gone]
    return Collection(
        uri=store.uri,
        garbage=tuple(sorted([*garbage, *partials], key=lambda listed: listed.key)),
        live_builds=tuple(sorted(live.builds)),
        dead_builds=tuple(sorted(all_builds - live.builds)),
        num_kept=len(kept),
        kept_bytes=sum(listed.num_bytes for listed in kept),
    )


def _now(everything: list[Listed]) -> datetime:
    """Return this moment by this machine's clock, or the newest time in the store where that is
    later.
    """
    here = datetime.now().astimezone()
    return max([here, *(listed.modified for listed in everything)])


def _find_live(
    store: ReadableStore, everything: list[Listed], old: set[str], *, keep: int
) -> _Live:
    live = _Live()
    for name, numbers in list_references(store).items():
        for number in numbers:
            key = f"refs/{name}/{number:06d}.json"
            if number in numbers[-keep:] or key not in old:
                live.keys.add(key)
                live.builds.add(read_reference(store, name, number).build)
    there = {listed.key for listed in everything}
    for key in there:
        parts = key.split("/")
        if (
            len(parts) == 3
            and parts[0] == "builds"
            and parts[2] == "manifest.json"
            and key not in old
        ):
            live.builds.add(parts[1])
    for build in sorted(live.builds):
        if manifest_key(build) in there:
            live.keys |= needed_keys(read_manifest(store, build))
    return live


def needed_keys(manifest: Manifest) -> set[str]:
    """Return every key that a build consists of, and the entries by which a later run finds its
    objects.
    """
    files = {
        file.key
        for files in (manifest.base.files, *(expert.files for expert in manifest.experts))
        for file in files
    }
    objects = {entry.key for entry in manifest.entries}
    entries = {key.removesuffix(".safetensors") + ".json" for key in objects}
    return {manifest_key(manifest.build), manifest.table.key} | files | objects | entries


def _may_go(key: str, live: _Live, *, surveys: bool) -> bool:
    if key in live.keys:
        return False
    top = key.partition("/")[0]
    if top == "builds":
        return key.split("/")[1] not in live.builds
    return top in ("refs", "objects", "files", "probe", "claims") or (top == "surveys" and surveys)
