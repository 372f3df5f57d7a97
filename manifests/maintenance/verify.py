"""Verification: check a build's structure, re-read its bytes, and compare every digest."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from mmerge.manifests.errors import ManifestError, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.format.entry import ObjectEntry, TensorRow
from mmerge.manifests.format.manifest import read_file
from mmerge.manifests.format.object_header import describe_row
from mmerge.manifests.format.references import list_references, read_reference, reference_key
from mmerge.manifests.format.stored_objects import READ_BYTES, read_pieces
from mmerge.manifests.format.table import Group, StoredRow, group_of, group_rows
from mmerge.manifests.maintenance.check_build import (
    CheckedBuild,
    check_build,
    find_reference_damages,
)
from mmerge.manifests.maintenance.damage import make_error
from mmerge.manifests.stores.base import ReadableStore

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
            raise make_error(self.uri, self.damages)


def verify(
    uri: str,
    *,
    sample: float = 1.0,
    seed: int | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> VerifyReport:
    """Check the build at `uri`, re-read its objects, and return its damages.

    Args:
        uri: the build.
        sample: share of the tensors that is read, in (0, 1]. For any share, references, manifest,
            table, entries, files, and size and header of every object are compared.
        seed: seed of the choice of tensors; another choice each time if absent.
        on_bytes: receives the size of every piece that is read.

    Raises:
        ManifestError: `sample` is no share, or the reference, the manifest or its table is missing
            or cannot be parsed, so that nothing else can be checked.
    """
    if not 0 < sample <= 1:
        raise ManifestError(f"--sample: expected a share in (0, 1], got {sample:g}")
    checked, damages = check_build(uri, level="structure")
    report = VerifyReport(uri=uri, build=checked.build)
    report.damages += [damage.sentence for damage in damages]
    report.damages += [
        sentence
        for sentence in _check_references(checked)
        if sentence not in report.damages  # the reference in `uri` was compared before
    ]
    groups = group_rows(checked.rows)
    objects = list({entry.key: entry for entry in checked.manifest.entries}.values())
    chosen: Mapping[Group, list[StoredRow]] | None = None
    if sample < 1:
        chosen = _choose([groups[group_of(entry)] for entry in objects], sample, seed=seed)
    reader = ObjectReader(checked.store, {damage.key for damage in damages}, on_bytes)

    def check(entry: ObjectEntry) -> list[str]:
        group = group_of(entry)
        if chosen is None:
            return reader.check_object(entry, groups[group])
        return reader.check_tensors(entry, chosen[group])

    with ThreadPoolExecutor(CONCURRENT_OBJECTS) as pool:
        for entry, sentences in zip(objects, pool.map(check, objects), strict=True):
            report.damages += sentences
            report.num_objects += 1
            if chosen is None:
                report.num_bytes += entry.num_bytes
            else:
                report.num_bytes += sum(row.num_bytes for row in chosen[group_of(entry)])
    _check_files(checked, reader.damaged, report)
    return report


def _check_references(checked: CheckedBuild) -> Iterator[str]:
    """Yield the damages of the references of this build, and of all numbers of their names."""
    store, build = checked.store, checked.build
    for name, numbers in list_references(store).items():
        references, sentences = [], []
        for number in numbers:
            try:
                references.append(read_reference(store, name, number))
            except StoreUnavailable:
                raise
            except NotFound:
                sentences.append(f"{reference_key(name, number)}: is missing")
            except (ManifestError, StoreError) as error:
                sentences.append(Exception.__str__(error))
        references = [reference for reference in references if reference.build == build]
        if references:
            yield from sentences
        for reference in references:
            for damage in find_reference_damages(reference, checked.manifest):
                yield damage.sentence


def _check_files(checked: CheckedBuild, damaged: Collection[str], report: VerifyReport) -> None:
    """Compare the digests of the small files whose sizes are right."""
    for file in checked.manifest.unique_files():
        report.num_objects += 1
        report.num_bytes += file.num_bytes
        if file.key in damaged:
            continue
        try:
            read_file(checked.store, file)
        except (ManifestError, StoreError) as error:
            report.damages.append(Exception.__str__(error))


def _choose(
    rows_by_object: Sequence[Sequence[StoredRow]], sample: float, *, seed: int | None
) -> Mapping[Group, list[StoredRow]]:
    """Return a share of all tensors, at least one, by object and shard."""
    rows = [row for object_rows in rows_by_object for row in object_rows]
    count = min(len(rows), max(1, round(sample * len(rows))))
    return group_rows(random.Random(seed).sample(rows, count))


@dataclass(frozen=True)
class ObjectReader:
    """Re-reads objects and compares their digests."""

    store: ReadableStore
    damaged: Collection[str] = ()
    """Keys of objects whose size or header is known to differ."""
    on_bytes: Callable[[int], None] = lambda num_bytes: None

    def check_tensors(self, entry: ObjectEntry, chosen: Sequence[TensorRow]) -> list[str]:
        """Return the damages of some tensors of one object, a sentence each."""
        if entry.key in self.damaged:
            return []
        try:
            return [
                _describe_damage(entry, row)
                for row in chosen
                if self._digest_row(entry, row) != row.digest
            ]
        except StoreError as error:
            return [Exception.__str__(error)]

    def _digest_row(self, entry: ObjectEntry, row: TensorRow) -> str:
        digest = blake3()
        for offset in range(0, row.num_bytes, READ_BYTES):
            num_bytes = min(READ_BYTES, row.num_bytes - offset)
            data = self.store.read_range(entry.key, offset=row.offset + offset, num_bytes=num_bytes)
            digest.update(data)
            self.on_bytes(num_bytes)
        return str(digest.hexdigest())

    def check_object(self, entry: ObjectEntry, rows: Sequence[TensorRow]) -> list[str]:
        """Return the damages of the bytes of one object: a sentence per tensor, or for all."""
        try:
            if self.store.num_bytes(entry.key) != entry.num_bytes:
                return [] if entry.key in self.damaged else [f"{entry.key}: its size changed"]
            whole = blake3()
            # By position: of two equal rows each has its own digest.
            row_digests = [blake3() for _ in rows]
            for offset, data in read_pieces(self.store, entry.key, num_bytes=entry.num_bytes):
                whole.update(data)
                for row, digest in zip(rows, row_digests, strict=True):
                    _update_digest(digest, row, data, offset)
                self.on_bytes(len(data))
        except StoreError as error:
            return [] if entry.key in self.damaged else [Exception.__str__(error)]
        sentences = [
            _describe_damage(entry, row)
            for row, digest in zip(rows, row_digests, strict=True)
            if digest.hexdigest() != row.digest
        ]
        if sentences or entry.key in self.damaged or whole.hexdigest() == entry.digest:
            return sentences
        return [
            f"{entry.key} ({entry.shard}): its digest is {whole.hexdigest()[:12]}, the manifest"
            f" says {entry.digest[:12]}, though those of all its tensors are equal"
        ]


def _update_digest(digest: blake3, row: TensorRow, data: memoryview, offset: int) -> None:
    """Add what a piece of an object has of a tensor to the digest of that tensor."""
    begin = max(row.offset, offset)
    stop = min(row.offset + row.num_bytes, offset + len(data))
    if begin < stop:
        digest.update(data[begin - offset : stop - offset])


def _describe_damage(entry: ObjectEntry, row: TensorRow) -> str:
    stop = row.offset + row.num_bytes
    return f"{entry.key}: {describe_row(row)}: damaged within bytes {row.offset} to {stop}"
