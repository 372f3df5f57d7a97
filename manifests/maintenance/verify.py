"""Verification: re-read a build, and compare every digest with the manifest."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from mmerge.manifests.errors import DamagedObject, ManifestError, NotFound, StoreError
from mmerge.manifests.format.entry import ObjectEntry
from mmerge.manifests.format.manifest import read_file, read_manifest
from mmerge.manifests.format.object_header import (
    describe_held,
    describe_row,
    describe_size,
    find_header_damage,
)
from mmerge.manifests.format.references import open_build
from mmerge.manifests.format.table import Group, StoredRow, group_of, group_rows, read_table
from mmerge.manifests.stores.base import ReadableStore

READ_BYTES = 16 << 20
"""Bytes of one read."""
CONCURRENT_OBJECTS = 4


@dataclass
class VerifyReport:
    """The amount that was read, and all damages, as sentences that name object and tensor."""

    uri: str
    build: str
    num_objects: int = 0
    num_bytes: int = 0
    damages: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raise DamagedObject if anything is damaged."""
        if self.damages:
            raise DamagedObject(
                f"{self.uri}: {len(self.damages)} damaged:\n  "
                + "\n  ".join(self.damages)
                + "\nRun the recipe again with --fresh to write them anew"
            )


def verify(
    uri: str,
    *,
    sample: float = 1.0,
    seed: int | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> VerifyReport:
    """Re-read the build at `uri`, and return its damages.

    Args:
        uri: the build.
        sample: share of the tensors that is read, in (0, 1]. Size and header of every object are
            compared for any share.
        seed: seed of the choice of tensors; another choice each time if absent.
        on_bytes: receives the size of every piece that is read.

    Raises:
        ManifestError: `sample` is no share, or the manifest or its table is missing or damaged, so
            that nothing else can be checked.
    """
    if not 0 < sample <= 1:
        raise ManifestError(f"--sample: expected a share in (0, 1], got {sample:g}")
    store, build = open_build(uri)
    manifest = read_manifest(store, build)
    verifier = _Verifier(store, manifest.method, on_bytes)
    rows = group_rows(read_table(store, manifest.table))
    objects = list({entry.key: entry for entry in manifest.entries}.values())
    report = VerifyReport(uri=uri, build=build)
    chosen: Mapping[Group, list[StoredRow]] | None = None
    if sample < 1:
        chosen = _choose([rows[group_of(entry)] for entry in objects], sample, random.Random(seed))

    def check(entry: ObjectEntry) -> list[str]:
        group = group_of(entry)
        if chosen is None:
            return verifier.check_object(entry, rows[group])
        return verifier.check_tensors(entry, rows[group], chosen=chosen[group])

    with ThreadPoolExecutor(CONCURRENT_OBJECTS) as pool:
        for entry, damages in zip(objects, pool.map(check, objects), strict=True):
            report.damages += damages
            report.num_objects += 1
            if chosen is None:
                report.num_bytes += entry.num_bytes
            else:
                report.num_bytes += sum(row.num_bytes for row in chosen[group_of(entry)])
    for file in manifest.unique_files():
        try:
            read_file(store, file)
        except (ManifestError, StoreError) as error:
            report.damages.append(Exception.__str__(error))
        report.num_objects += 1
        report.num_bytes += file.num_bytes
    return report


def _choose(
    rows_by_object: Sequence[Sequence[StoredRow]], sample: float, generator: random.Random
) -> Mapping[Group, list[StoredRow]]:
    """Return a share of all tensors, at least one, by object and shard."""
    rows = [row for object_rows in rows_by_object for row in object_rows]
    count = min(len(rows), max(1, round(sample * len(rows))))
    return group_rows(generator.sample(rows, count))


@dataclass(frozen=True)
class _Verifier:
    store: ReadableStore
    method: str
    """The method in the manifest; headers name it."""
    on_bytes: Callable[[int], None]

    def check_tensors(
        self, entry: ObjectEntry, rows: list[StoredRow], *, chosen: list[StoredRow]
    ) -> list[str]:
        """Return the damages of some tensors of one object, and of its size and header."""
        try:
            header = find_header_damage(self.store, entry, rows, method=self.method)
            if header:
                return [header]
            return [
                _describe_damage(entry, row)
                for row in chosen
                if self._digest_row(entry, row) != row.digest
            ]
        except NotFound:
            return [_describe_missing(entry, rows)]
        except StoreError as error:
            return [Exception.__str__(error)]

    def _digest_row(self, entry: ObjectEntry, row: StoredRow) -> str:
        digest = blake3()
        for offset in range(0, row.num_bytes, READ_BYTES):
            num_bytes = min(READ_BYTES, row.num_bytes - offset)
            data = self.store.read_range(entry.key, offset=row.offset + offset, num_bytes=num_bytes)
            digest.update(data)
            self.on_bytes(num_bytes)
        return str(digest.hexdigest())

    def check_object(self, entry: ObjectEntry, rows: list[StoredRow]) -> list[str]:
        """Return the damages of one object: a sentence per damaged tensor, or for all."""
        try:
            num_bytes = self.store.num_bytes(entry.key)
            if num_bytes != entry.num_bytes:
                return [describe_size(entry, rows, num_bytes)]
            whole = blake3()
            # By position: of two equal rows each has its own digest.
            row_digests = [blake3() for _ in rows]
            for offset, data in self._read_pieces(entry):
                whole.update(data)
                for row, digest in zip(rows, row_digests, strict=True):
                    _update_digest(digest, row, data, offset)
                self.on_bytes(len(data))
            if whole.hexdigest() == entry.digest:
                return []
            header = find_header_damage(self.store, entry, rows, method=self.method)
        except NotFound:
            return [_describe_missing(entry, rows)]
        except StoreError as error:
            return [Exception.__str__(error)]
        damages = [header] if header else []
        for row, digest in zip(rows, row_digests, strict=True):
            if digest.hexdigest() != row.digest:
                damages.append(_describe_damage(entry, row))
        return damages or [
            f"{entry.key} ({entry.shard}): its digest differs from the manifest, though those of"
            " all its tensors do not"
        ]

    def _read_pieces(self, entry: ObjectEntry) -> Iterator[tuple[int, memoryview]]:
        for offset in range(0, entry.num_bytes, READ_BYTES):
            num_bytes = min(READ_BYTES, entry.num_bytes - offset)
            data = self.store.read_forward(
                entry.key, offset=offset, num_bytes=num_bytes, start=0, stop=entry.num_bytes
            )
            yield offset, data


def _update_digest(digest: blake3, row: StoredRow, data: memoryview, offset: int) -> None:
    """Add what a piece of an object has of a tensor to the digest of that tensor."""
    begin = max(row.offset, offset)
    stop = min(row.offset + row.num_bytes, offset + len(data))
    if begin < stop:
        digest.update(data[begin - offset : stop - offset])


def _describe_damage(entry: ObjectEntry, row: StoredRow) -> str:
    stop = row.offset + row.num_bytes
    return f"{entry.key}: {describe_row(row)}: damaged within bytes {row.offset} to {stop}"


def _describe_missing(entry: ObjectEntry, rows: list[StoredRow]) -> str:
    return f"{entry.key} ({entry.shard}): is missing{describe_held(rows)}"
