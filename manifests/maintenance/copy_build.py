"""Copy a build between stores, whole or only the missing objects, and check every digest."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from blake3 import blake3

from mmerge.manifests.errors import DamagedObject, ManifestError, NotFound
from mmerge.manifests.format.entry import ObjectEntry, read_entry, write_entry
from mmerge.manifests.format.manifest import (
    FileEntry,
    manifest_key,
    read_file,
    read_manifest,
    write_manifest,
)
from mmerge.manifests.format.references import (
    Reference,
    find_build,
    find_reference,
    split_uri,
    write_reference,
)
from mmerge.manifests.format.table import read_table_bytes
from mmerge.manifests.maintenance.lease import Lease
from mmerge.manifests.maintenance.signatures import MAX_SIGNATURE_BYTES, list_signatures
from mmerge.manifests.stores.base import ReadableStore, Store
from mmerge.manifests.stores.create_check import check_store
from mmerge.manifests.stores.open import open_readable_store, open_store

READ_BYTES = 16 << 20
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


def copy_build(
    uri: str,
    target_uri: str,
    *,
    name: str | None = None,
    everything: bool = False,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> CopyReport:
    """Copy the build at `uri` into the store at `target_uri`, and give it a name there.

    The manifest is written last, so that a reader of the target never sees an incomplete build.

    Args:
        uri: the build, as STORE, STORE#NAME, STORE#NAME@N or STORE#DIGEST.
        target_uri: the store to copy into; a missing folder is made.
        name: the name in the target; that of the source if absent.
        everything: copy objects that the target has already, too (they may be damaged).
        on_bytes: receives the size of every piece that is copied.

    Raises:
        DamagedObject, ManifestError: the source is damaged or incomplete.
        StoreError: a store cannot be read or written.
    """
    source_uri, fragment = split_uri(uri)
    source, target = open_readable_store(source_uri), open_store(target_uri, create=True)
    build = find_build(source, fragment)
    manifest = read_manifest(source, build)
    origin = find_reference(source, fragment, build)
    if name is None and origin is None:
        raise ManifestError(f"{uri}: no name points to build {build[:12]}. Choose one with --name")
    check_store(target)
    with Lease(target, "run") as lease:
        lease.wait_for_none("collect")
        copier = _Copier(source, target, everything, on_bytes)
        objects = {entry.key: entry for entry in manifest.entries}
        with ThreadPoolExecutor(CONCURRENT_OBJECTS) as pool:
            copied_bytes = list(pool.map(copier.copy_object, objects.values()))
            copied_bytes += pool.map(copier.copy_file, manifest.unique_files())
        if everything or not target.exists(manifest_key(build)):
            target.put(manifest.table.key, read_table_bytes(source, manifest.table))
        for key in list_signatures(source, build):
            target.put(key, source.read(key, max_bytes=MAX_SIGNATURE_BYTES))
        write_manifest(target, manifest)
        reference, _ = write_reference(
            target,
            name or (origin.name if origin else ""),
            build,
            sources=origin.sources if origin else {},
            versions=origin.versions if origin else {},
        )
    return CopyReport(
        uri=f"{target.uri}#{reference.name}",
        build=build,
        reference=reference,
        num_copied=sum(num_bytes > 0 for num_bytes in copied_bytes),
        num_present=copied_bytes.count(0),
        copied_bytes=sum(copied_bytes),
    )


@dataclass(frozen=True)
class _Copier:
    source: ReadableStore
    target: Store
    everything: bool
    on_bytes: Callable[[int], None]

    def copy_object(self, entry: ObjectEntry) -> int:
        """Copy one object and its entry; return the copied bytes, 0 if the target had it."""
        if not self.everything and self._is_present(entry.key, entry.num_bytes):
            return 0
        digest = blake3()
        try:
            with self.target.open_writer(entry.key) as out:
                for offset in range(0, entry.num_bytes, READ_BYTES):
                    data = self.source.read_forward(
                        entry.key,
                        offset=offset,
                        num_bytes=min(READ_BYTES, entry.num_bytes - offset),
                        start=0,
                        stop=entry.num_bytes,
                    )
                    digest.update(data)
                    out.write(data)
                    self.on_bytes(len(data))
                if digest.hexdigest() != entry.digest:
                    raise DamagedObject(
                        f"{self.source.uri}: {entry.key} ({entry.shard}) is damaged. 'mmerge"
                        " verify' names the tensors; it was not copied"
                    )
        except NotFound as error:
            raise DamagedObject(
                f"{self.source.uri}: {entry.key} ({entry.shard}) is missing. Run the recipe again"
            ) from error
        stem = entry.key.removeprefix("objects/").removesuffix(".safetensors")
        shard_entry = read_entry(self.source, stem)
        if shard_entry is not None:
            write_entry(self.target, stem, shard_entry)
        return entry.num_bytes

    def copy_file(self, entry: FileEntry) -> int:
        """Copy one small file; return the copied bytes, 0 if the target had it."""
        if not self.everything and self._is_present(entry.key, entry.num_bytes):
            return 0
        self.target.put(entry.key, read_file(self.source, entry))
        return entry.num_bytes

    def _is_present(self, key: str, num_bytes: int) -> bool:
        try:
            return self.target.num_bytes(key) == num_bytes
        except NotFound:
            return False
