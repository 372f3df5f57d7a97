"""Commit a build although its run may have been suspended for longer than its lease lives.

Order of steps (docs/storage.md has the argument why this is enough):

1. announce the keys of the build, renew the lease, and wait until no collection is active;
2. check that every object, file and table of the manifest is there with its size, and every entry;
3. create the manifest, or the reference, if steps 1 and 2 began a moment ago; otherwise again.

The three steps are done for the manifest, and once more for the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from mmerge.manifests.errors import MissingObjects, NotFound, StoreUnavailable
from mmerge.manifests.format.entry import digest_of_object, entry_key
from mmerge.manifests.format.manifest import Manifest, digest_manifest, manifest_key, needed_keys
from mmerge.manifests.format.publish import Publication, publish_build
from mmerge.manifests.format.references import Reference, write_reference
from mmerge.manifests.maintenance.lease import LAPSE_SECONDS, Lease
from mmerge.manifests.stores.base import ReadableStore

ATTEMPTS = 5
CONCURRENT_CHECKS = 8


class _Delayed(Exception):
    """Too much time has passed since the objects of the build were checked."""


class FencedCommit:
    """Creates the manifest of one build and the reference to it, under a lease of kind `run`.

    Order of calls: `publish` unless the store has the whole build, then `write_reference`.
    """

    def __init__(self, lease: Lease, manifest: Manifest) -> None:
        self._lease, self._manifest = lease, manifest
        self._began = 0.0

    def publish(self, table: bytes) -> Publication:
        """Write the table and create the manifest, as `publish_build` does.

        Raises:
            MissingObjects: an object or a file that the manifest names is not in the store.
            BuildDiffers: the store has this build with another result.
            StoreError: a collection does not end, or the store cannot be written.
        """
        sizes = manifest_sizes(self._manifest)
        del sizes[self._manifest.table.key]  # written next, and read back
        for _ in range(ATTEMPTS):
            self._confirm(sizes)
            try:
                return publish_build(
                    self._lease.store, self._manifest, table, check=self._check_time
                )
            except _Delayed:
                continue
        raise self._give_up(manifest_key(self._manifest.build))

    def write_reference(
        self, name: str, *, sources: dict[str, str], versions: dict[str, str]
    ) -> tuple[Reference, bool]:
        """Make NAME@latest resolve to the build; return the reference, and whether it is new.

        Raises:
            MissingObjects: the manifest, or something that it names, is not in the store.
            StoreError: a collection does not end, or the store cannot be written.
        """
        build = self._manifest.build
        for _ in range(ATTEMPTS):
            self._confirm({manifest_key(build): None, **manifest_sizes(self._manifest)})
            try:
                return write_reference(
                    self._lease.store,
                    name,
                    build,
                    sources=sources,
                    versions=versions,
                    manifest=digest_manifest(self._manifest),
                    check=self._check_time,
                )
            except _Delayed:
                continue
        raise self._give_up(f"refs/{name}")

    def _confirm(self, sizes: Mapping[str, int | None]) -> None:
        self._began = self._lease.timing.now()
        self._lease.announce(needed_keys(self._manifest))
        self._lease.wait_for_none("collect")
        missing = find_missing(self._lease.store, sizes)
        if missing:
            raise MissingObjects(self._lease.store.uri, missing)

    def _check_time(self) -> None:
        if self._lease.timing.now() - self._began > LAPSE_SECONDS:
            raise _Delayed

    def _give_up(self, key: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self._lease.store.uri}: {key}: the checks before it take longer than"
            f" {LAPSE_SECONDS:.0f} s. Run again when the store or this machine is less busy"
        )


def manifest_sizes(manifest: Manifest) -> dict[str, int | None]:
    """Return the size of every object, file and table that a manifest names, by key.

    The entries of its objects have any size (None). A collection deletes them first, and may have
    ended between an entry and its object.
    """
    sizes: dict[str, int | None] = {entry.key: entry.num_bytes for entry in manifest.entries}
    sizes |= {entry_key(digest_of_object(entry.key)): None for entry in manifest.entries}
    sizes |= {file.key: file.num_bytes for file in manifest.unique_files()}
    return {**sizes, manifest.table.key: manifest.table.num_bytes}


def find_missing(store: ReadableStore, sizes: Mapping[str, int | None]) -> list[str]:
    """Return the keys that the store lacks or has with another size; None stands for any size."""

    def is_missing(key: str) -> bool:
        try:
            num_bytes = store.num_bytes(key)
        except NotFound:
            return True
        return sizes[key] not in (None, num_bytes)

    if not store.is_remote:
        return [key for key in sizes if is_missing(key)]
    with ThreadPoolExecutor(CONCURRENT_CHECKS) as pool:
        results = list(pool.map(is_missing, sizes))
    return [key for key, result in zip(sizes, results, strict=True) if result]
