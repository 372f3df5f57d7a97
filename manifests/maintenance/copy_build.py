"""Copy a build between stores, whole or only the missing objects, and check every digest."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blake3 import blake3

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import (
    REPAIR,
    BuildDiffers,
    DamagedObject,
    ManifestError,
    NotFound,
    StoreUnavailable,
)
from mmerge.manifests.format.entry import (
    ObjectEntry,
    ShardEntry,
    digest_of_object,
    entry_key,
    find_entry,
    write_entry,
)
from mmerge.manifests.format.files import PutResult, put_file
from mmerge.manifests.format.manifest import FileEntry, read_file
from mmerge.manifests.format.publish import check_same_build, find_whole_manifest
from mmerge.manifests.format.references import (
    Reference,
    find_reference,
    split_uri,
)
from mmerge.manifests.format.stored_objects import (
    digest_object,
    find_listings,
    find_object_damage,
    read_pieces,
)
from mmerge.manifests.format.table import read_table_bytes
from mmerge.manifests.maintenance.check_build import find_stored_damages, open_checked_build
from mmerge.manifests.maintenance.damage import make_error
from mmerge.manifests.maintenance.fenced_commit import FencedCommit
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.maintenance.signatures import MAX_SIGNATURE_BYTES, list_signatures
from mmerge.manifests.stores.base import ReadableStore, Store
from mmerge.manifests.stores.create_check import check_store
from mmerge.manifests.stores.open import open_store

CONCURRENT_OBJECTS = 4
"""Objects that are copied at once; each holds a piece of 16 MiB and the parts of its writer."""


@dataclass(frozen=True)
class CopyReport:
    """The result of a copy."""

    uri: str
    build: str
    reference: Reference
    num_copied: int
    num_present: int
    copied_bytes: int
    repaired: tuple[str, ...] = ()
    """Keys that were damaged in the target, and were written again."""


def copy_build(
    uri: str,
    target_uri: str,
    *,
    name: str | None = None,
    everything: bool = False,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> CopyReport:
    """Copy the build at `uri` into the store at `target_uri`, and give it a name there.

    The source is checked before anything is written, the objects of the target before the manifest
    is: it is written last, so that a reader of the target never sees an incomplete build.

    Args:
        uri: the build, as STORE, STORE#NAME, STORE#NAME@N or STORE#DIGEST.
        target_uri: the store to copy into; a missing folder is made.
        name: the name in the target; that of the source if absent.
        everything: read what the target has already, and repair what is damaged there.
        on_bytes: receives the size of every piece that is copied.

    Raises:
        BuildDiffers: the target has the build, or one of its objects, with other bytes.
        DamagedObject, ManifestError: the source is damaged or incomplete, or the target has an
            object of the build that is.
        StoreError: a store cannot be read or written.
    """
    checked = open_checked_build(uri, level="structure")
    source, build, manifest = checked.store, checked.build, checked.manifest
    table = read_table_bytes(source, manifest.table)
    target = open_store(target_uri, create=True)
    origin = find_reference(source, split_uri(uri)[1], build)
    if name is None and origin is None:
        raise ManifestError(f"{uri}: no name points to build {build[:12]}. Choose one with --name")
    check_store(target)
    with Lease(target, "run") as lease:
        lease.wait_for_none("collect")
        stored = find_whole_manifest(target, build)
        if stored is not None:
            check_same_build(target, stored, manifest)
        copier = _Copier(source, target, everything, on_bytes)
        objects = {entry.key: entry for entry in manifest.entries}
        with ThreadPoolExecutor(CONCURRENT_OBJECTS) as pool:
            copies = list(pool.map(copier.copy_object, objects.values()))
            copies += pool.map(copier.copy_file, manifest.unique_files())
        damages = find_stored_damages(target, manifest, checked.rows)
        if damages:
            sentences = [damage.sentence for damage in damages]
            raise make_error(target.uri, sentences, remedy="'mmerge copy --all' repairs them")
        publication = FencedCommit(lease, manifest).publish(table)
        if publication.manifest == manifest:
            copier.copy_signatures(build)
        reference, _ = FencedCommit(lease, publication.manifest).write_reference(
            name or (origin.name if origin else ""),
            sources=origin.sources if origin else {},
            versions=origin.versions if origin else {},
        )
    repaired = [copy.key for copy in copies if copy.result == "repaired"]
    return CopyReport(
        uri=f"{target.uri}#{reference.name}",
        build=build,
        reference=reference,
        num_copied=sum(copy.result != "present" for copy in copies),
        num_present=sum(copy.result == "present" for copy in copies),
        copied_bytes=sum(copy.num_bytes for copy in copies),
        repaired=(*repaired, *publication.repaired),
    )


@dataclass(frozen=True)
class _Copy:
    key: str
    result: PutResult
    num_bytes: int
    """Bytes that were written."""


@dataclass(frozen=True)
class _Copier:
    source: ReadableStore
    target: Store
    everything: bool
    on_bytes: Callable[[int], None]

    def copy_object(self, entry: ObjectEntry) -> _Copy:
        """Copy one object and its entry, unless the target has them.

        Raises:
            BuildDiffers: the target has the object with other bytes.
            DamagedObject: the source's object is missing or damaged.
        """
        digest = digest_of_object(entry.key)
        target_entry = find_entry(self.target, digest)
        result: PutResult = "created"
        if target_entry is not None or self.target.exists(entry.key):
            self._check_target(entry, target_entry)
            if find_object_damage(self.target, entry, read=self.everything) is None:
                if target_entry is not None:
                    return _Copy(entry.key, "present", 0)
                if (
                    self.everything
                    or digest_object(self.target, entry.key, num_bytes=entry.num_bytes)
                    == entry.digest
                ):
                    self._copy_entry(digest)
                    return _Copy(entry_key(digest), "repaired", 0)
            result = "repaired"
        self._copy_bytes(entry)
        self._copy_entry(digest)
        return _Copy(entry.key, result, entry.num_bytes)

    def _check_target(self, entry: ObjectEntry, target_entry: ShardEntry | None) -> None:
        """Raise BuildDiffers if the target depends on other bytes of an object."""
        if target_entry is not None and target_entry.object.digest == entry.digest:
            return
        others = [
            listing.build
            for listing in find_listings(self.target, entry.key)
            if listing.entry.digest != entry.digest
        ]
        if others:
            commands = " and ".join(
                f"'mmerge delete {self.target.uri}#{build[:SHOWN_DIGITS]} --objects --yes'"
                for build in others
            )
        elif target_entry is not None and not find_object_damage(
            self.target, target_entry.object, read=True
        ):
            commands = f"'mmerge gc {self.target.uri} --delete --grace 0s'"
        else:
            return
        raise BuildDiffers(
            f"{self.target.uri}: {entry.key} ({entry.shard}) has other bytes there than in"
            f" {self.source.uri}: nothing was replaced. To take the ones of the source: {commands},"
            " then copy again; or copy to another store"
        )

    def _copy_bytes(self, entry: ObjectEntry) -> None:
        digest = blake3()
        try:
            with self.target.open_writer(entry.key) as out:
                for _, data in read_pieces(self.source, entry.key, num_bytes=entry.num_bytes):
                    digest.update(data)
                    out.write(data)
                    self.on_bytes(len(data))
                if digest.hexdigest() != entry.digest:
                    raise DamagedObject(
                        f"{self.source.uri}: {entry.key} ({entry.shard}) is damaged, it was not"
                        f" copied; 'mmerge verify' names the tensors. {REPAIR}"
                    )
        except NotFound as error:
            raise DamagedObject(
                f"{self.source.uri}: {entry.key} ({entry.shard}) is missing. {REPAIR}"
            ) from error

    def _copy_entry(self, digest: str) -> None:
        shard_entry = find_entry(self.source, digest)
        if shard_entry is not None:
            write_entry(self.target, digest, shard_entry)

    def copy_file(self, entry: FileEntry) -> _Copy:
        """Copy one small file, unless the target has it whole."""
        if not self.everything and self._has_file(entry):
            return _Copy(entry.key, "present", 0)
        result = put_file(self.target, entry.key, read_file(self.source, entry))
        return _Copy(entry.key, result, 0 if result == "present" else entry.num_bytes)

    def copy_signatures(self, build: str) -> None:
        """Copy the signatures of a manifest that both stores have; the target keeps its own."""
        for key in list_signatures(self.source, build):
            if self.everything or not self.target.exists(key):
                self.target.put(key, self.source.read(key, max_bytes=MAX_SIGNATURE_BYTES))

    def _has_file(self, entry: FileEntry) -> bool:
        """Return whether the target has these bytes: nothing later would read them."""
        try:
            read_file(self.target, entry)
        except StoreUnavailable:
            raise
        except (NotFound, ManifestError):
            return False
        return True
