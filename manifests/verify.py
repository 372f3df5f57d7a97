"""Re-read a build and compare every digest with what the manifest says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from blake3 import blake3

from mmerge.manifests.entry import ObjectEntry
from mmerge.manifests.errors import DamagedObject, ManifestError, NotFound, StoreError
from mmerge.manifests.manifest import FileEntry, Manifest, read_file, read_manifest
from mmerge.manifests.reference import open_build
from mmerge.manifests.store import Store
from mmerge.manifests.table import StoredRow, read_table

READ_BYTES = 16 << 20
"""Bytes read at once."""


@dataclass
class VerifyReport:
    """What was read and every damage found, as sentences that name object and tensor."""

    uri: str
    build: str
    num_objects: int = 0
    num_bytes: int = 0
    damages: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise DamagedObject when anything is damaged."""
        if self.damages:
            raise DamagedObject(
                f"{self.uri}: {len(self.damages)} damaged:\n  "
                + "\n  ".join(self.damages)
                + "\nRun the recipe again with --fresh to write them anew"
            )


def verify(uri: str, *, on_bytes: Callable[[int], None] = lambda num_bytes: None) -> VerifyReport:
    """Return what a full re-read of the build at `uri` finds; `on_bytes` is told of every piece read.

    Raises:
        ManifestError: the manifest or its table is missing or damaged, so that nothing else can be checked.
    """
    store, build = open_build(uri)
    manifest = read_manifest(store, build)
    rows: dict[str, list[StoredRow]] = defaultdict(list)
    for row in read_table(store, manifest.table):
        rows[row.object].append(row)
    report = VerifyReport(uri=uri, build=build)
    for entry in manifest.entries:
        report.damages += verify_object(store, entry, rows.get(entry.key, []), on_bytes=on_bytes)
        report.num_objects += 1
        report.num_bytes += entry.num_bytes
    for file in _files(manifest):
        try:
            read_file(store, file)
        except (ManifestError, StoreError) as error:
            report.damages.append(Exception.__str__(error))
        report.num_objects += 1
        report.num_bytes += file.num_bytes
    return report


def _files(manifest: Manifest) -> list[FileEntry]:
    unique = {file.digest: file for file in manifest.base.files}
    for expert in manifest.experts:
        unique |= {file.digest: file for file in expert.files}
    return list(unique.values())


def verify_object(
    store: Store, entry: ObjectEntry, rows: list[StoredRow], *, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """Return the damages of one object: none, or one sentence per damaged tensor (or for the whole object)."""
    try:
        found = store.num_bytes(entry.key)
        if found != entry.num_bytes:
            return [f"{entry.key} ({entry.shard}): has {found:,} bytes, the manifest says {entry.num_bytes:,}"]
        whole = blake3()
        parts = {id(row): blake3() for row in rows}
        for offset, data in _read_pieces(store, entry):
            whole.update(data)
            _update_tensors(parts, rows, data, offset)
            on_bytes(len(data))
    except NotFound:
        return [f"{entry.key} ({entry.shard}): is missing"]
    except StoreError as error:
        return [Exception.__str__(error)]
    if whole.hexdigest() == entry.digest:
        return []
    damaged = [row for row in rows if parts[id(row)].hexdigest() != row.digest]
    if not damaged:
        return [f"{entry.key} ({entry.shard}): damaged outside of its tensors, in the header"]
    return [f"{entry.key}: {_describe(row)}: damaged within bytes {row.offset} to {row.offset + row.num_bytes}" for row in damaged]


def _describe(row: StoredRow) -> str:
    return f"{row.name} ({row.role}{' of ' + row.expert if row.expert else ''})"


def _read_pieces(store: Store, entry: ObjectEntry) -> Iterator[tuple[int, memoryview]]:
    for offset in range(0, entry.num_bytes, READ_BYTES):
        yield offset, store.read_range(entry.key, offset=offset, num_bytes=min(READ_BYTES, entry.num_bytes - offset))


def _update_tensors(parts: dict[int, blake3], rows: list[StoredRow], data: memoryview, offset: int) -> None:
    for row in rows:
        begin, stop = max(row.offset, offset), min(row.offset + row.num_bytes, offset + len(data))
        if begin < stop:
            parts[id(row)].update(data[begin - offset : stop - offset])
