"""Re-read a build and compare every digest with what the manifest says."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from mmerge.manifests.errors import DamagedObject, ManifestError, NotFound, StoreError
from mmerge.manifests.format.entry import ObjectEntry
from mmerge.manifests.format.manifest import FileEntry, Manifest, read_file, read_manifest
from mmerge.manifests.format.object_header import (
    describe_held,
    describe_row,
    describe_size,
    find_header_damage,
)
from mmerge.manifests.format.references import open_build
from mmerge.manifests.format.table import StoredRow, read_table
from mmerge.manifests.stores.base import ReadableStore

READ_BYTES = 16 << 20
"""Bytes read at once, of each object."""
OBJECTS_AT_ONCE = 4

Group = tuple[str, str]
"""Key of an object, and the shard that it is in this build."""


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


def verify(
    uri: str,
    *,
    sample: float = 1.0,
    seed: int | None = None,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> VerifyReport:
    """Return what a re-read of the build at `uri` finds.

    Args:
        uri: the build.
        sample: share of the tensors that is read, in (0, 1]; of 1 everything is read. Size and
            header of every object are compared in any case.
        seed: which tensors a sample takes; other ones each time if absent.
        on_bytes: told of every piece read.

    Raises:
        ManifestError: `sample` is no share; or
        ManifestError: the manifest or its table is missing or damaged, so that nothing else can be
            checked.
    """
    if not 0 < sample <= 1:
        raise ManifestError(f"--sample: expected a share in (0, 1], got {sample:g}")
    store, build = open_build(uri)
    manifest = read_manifest(store, build)
    rows = group_rows(read_table(store, manifest.table))
    report = VerifyReport(uri=uri, build=build)
    objects = list({entry.key: entry for entry in manifest.entries}.values())
    chosen = (
        _choose([rows[_group(entry)] for entry in objects], sample, random.Random(seed))
        if sample < 1
        else None
    )

    def check(entry: ObjectEntry) -> list[str]:
        if chosen is None:
            return verify_object(
                store, entry, rows[_group(entry)], method=manifest.method, on_bytes=on_bytes
            )
        return verify_tensors(
            store,
            entry,
            rows[_group(entry)],
            chosen[_group(entry)],
            method=manifest.method,
            on_bytes=on_bytes,
        )

    with ThreadPoolExecutor(OBJECTS_AT_ONCE) as pool:
        for entry, damages in zip(objects, pool.map(check, objects), strict=True):
            report.damages += damages
            report.num_objects += 1
            report.num_bytes += (
                entry.num_bytes
                if chosen is None
                else sum(row.num_bytes for row in chosen[_group(entry)])
            )
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


def _group(entry: ObjectEntry) -> Group:
    return entry.key, entry.shard


def group_rows(rows: Iterable[StoredRow]) -> defaultdict[Group, list[StoredRow]]:
    """Return a table's rows by object and shard: one object may be two shards of a build, as where
    two experts carry one encoder.
    """
    groups: defaultdict[Group, list[StoredRow]] = defaultdict(list)
    for row in rows:
        groups[row.object, row.shard].append(row)
    return groups


def _choose(
    rows: Sequence[Sequence[StoredRow]], sample: float, chance: random.Random
) -> defaultdict[Group, list[StoredRow]]:
    """Return a share of all tensors, at least one, by object and shard."""
    every = [row for found in rows for row in found]
    return group_rows(chance.sample(every, min(len(every), max(1, round(sample * len(every))))))


def verify_tensors(
    store: ReadableStore,
    entry: ObjectEntry,
    rows: list[StoredRow],
    chosen: list[StoredRow],
    *,
    method: str,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Return the damages of the chosen tensors of one object, and of its size and header."""
    try:
        header = find_header_damage(store, entry, rows, method=method)
        damages = [header] if header else []
        for row in chosen if not damages else ():
            digest = blake3()
            for offset in range(0, row.num_bytes, READ_BYTES):
                data = store.read_range(
                    entry.key,
                    offset=row.offset + offset,
                    num_bytes=min(READ_BYTES, row.num_bytes - offset),
                )
                digest.update(data)
                on_bytes(len(data))
            if digest.hexdigest() != row.digest:
                damages.append(_describe_damage(entry, row))
        return damages
    except NotFound:
        return [_describe_missing(entry, rows)]
    except StoreError as error:
        return [Exception.__str__(error)]


def verify_object(
    store: ReadableStore,
    entry: ObjectEntry,
    rows: list[StoredRow],
    *,
    method: str,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Return the damages of one object: none, or one sentence per damaged tensor (or for the whole
    object).
    """
    try:
        found = store.num_bytes(entry.key)
        if found != entry.num_bytes:
            return [describe_size(entry, rows, found)]
        whole = blake3()
        parts = {id(row): blake3() for row in rows}
        for offset, data in _read_pieces(store, entry):
            whole.update(data)
            _update_tensors(parts, rows, data, offset)
            on_bytes(len(data))
        if whole.hexdigest() == entry.digest:
            return []
        header = find_header_damage(store, entry, rows, method=method)
    except NotFound:
        return [_describe_missing(entry, rows)]
    except StoreError as error:
        return [Exception.__str__(error)]
    damages = [
        _describe_damage(entry, row) for row in rows if parts[id(row)].hexdigest() != row.digest
    ]
    if header:
        damages.insert(0, header)
    return damages or [
        f"{entry.key} ({entry.shard}): its digest is not that of the manifest, though all of its"
        " tensors' are"
    ]


def _describe_damage(entry: ObjectEntry, row: StoredRow) -> str:
    return (
        f"{entry.key}: {describe_row(row)}: damaged within bytes {row.offset} to"
        f" {row.offset + row.num_bytes}"
    )


def _describe_missing(entry: ObjectEntry, rows: list[StoredRow]) -> str:
    return f"{entry.key} ({entry.shard}): is missing{describe_held(rows)}"


def _read_pieces(store: ReadableStore, entry: ObjectEntry) -> Iterator[tuple[int, memoryview]]:
    for offset in range(0, entry.num_bytes, READ_BYTES):
        yield (
            offset,
            store.read_forward(
                entry.key,
                offset=offset,
                num_bytes=min(READ_BYTES, entry.num_bytes - offset),
                start=0,
                stop=entry.num_bytes,
            ),
        )


def _update_tensors(
    parts: dict[int, blake3], rows: list[StoredRow], data: memoryview, offset: int
) -> None:
    for row in rows:
        begin, stop = max(row.offset, offset), min(row.offset + row.num_bytes, offset + len(data))
        if begin < stop:
            parts[id(row)].update(data[begin - offset : stop - offset])
