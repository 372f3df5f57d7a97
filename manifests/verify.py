"""Re-read a build and compare every digest with what the manifest says."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from blake3 import blake3

from mmerge.manifests.entry import ObjectEntry
from mmerge.manifests.errors import DamagedObject, ManifestError, NotFound, StoreError
from mmerge.manifests.manifest import FileEntry, Manifest, read_file, read_manifest
from mmerge.manifests.reference import open_build
from mmerge.manifests.store import Store
from mmerge.manifests.table import StoredRow, read_table

READ_BYTES = 16 << 20
"""Bytes read at once, of each object."""
OBJECTS_AT_ONCE = 4


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
    uri: str, *, sample: float = 1.0, seed: int | None = None, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> VerifyReport:
    """Return what a re-read of the build at `uri` finds.

    Args:
        uri: the build.
        sample: share of the tensors that is read, in (0, 1]; of 1 everything is read, headers of objects and all. The size of
            every object is compared in any case.
        seed: which tensors a sample takes; other ones each time if absent.
        on_bytes: told of every piece read.

    Raises:
        ManifestError: `sample` is no share; or
        ManifestError: the manifest or its table is missing or damaged, so that nothing else can be checked.
    """
    if not 0 < sample <= 1:
        raise ManifestError(f"--sample: expected a share in (0, 1], got {sample:g}")
    store, build = open_build(uri)
    manifest = read_manifest(store, build)
    rows: dict[str, list[StoredRow]] = defaultdict(list)
    for row in read_table(store, manifest.table):
        rows[row.object].append(row)
    report = VerifyReport(uri=uri, build=build)
    objects = list({entry.key: entry for entry in manifest.entries}.values())
    chosen = _choose(rows, sample, random.Random(seed)) if sample < 1 else None

    def check(entry: ObjectEntry) -> list[str]:
        if chosen is None:
            return verify_object(store, entry, rows.get(entry.key, []), on_bytes=on_bytes)
        return verify_tensors(store, entry, chosen.get(entry.key, []), on_bytes=on_bytes)

    with ThreadPoolExecutor(OBJECTS_AT_ONCE) as pool:
        for entry, damages in zip(objects, pool.map(check, objects), strict=True):
            report.damages += damages
            report.num_objects += 1
            report.num_bytes += entry.num_bytes if chosen is None else sum(row.num_bytes for row in chosen.get(entry.key, []))
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


def _choose(rows: dict[str, list[StoredRow]], sample: float, chance: random.Random) -> dict[str, list[StoredRow]]:
    """Return a share of all tensors, at least one, by object."""
    every = [row for found in rows.values() for row in found]
    chosen: dict[str, list[StoredRow]] = defaultdict(list)
    for row in chance.sample(every, min(len(every), max(1, round(sample * len(every))))):
        chosen[row.object].append(row)
    return chosen


def verify_tensors(
    store: Store, entry: ObjectEntry, rows: list[StoredRow], *, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """Return the damages of some tensors of one object, and of its size."""
    try:
        found = store.num_bytes(entry.key)
        if found != entry.num_bytes:
            return [_describe_size(entry, rows, found)]
        damages = []
        for row in rows:
            digest = blake3()
            for offset in range(0, row.num_bytes, READ_BYTES):
                data = store.read_range(entry.key, offset=row.offset + offset, num_bytes=min(READ_BYTES, row.num_bytes - offset))
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
    store: Store, entry: ObjectEntry, rows: list[StoredRow], *, on_bytes: Callable[[int], None] = lambda num_bytes: None
) -> list[str]:
    """Return the damages of one object: none, or one sentence per damaged tensor (or for the whole object)."""
    try:
        found = store.num_bytes(entry.key)
        if found != entry.num_bytes:
            return [_describe_size(entry, rows, found)]
        whole = blake3()
        parts = {id(row): blake3() for row in rows}
        for offset, data in _read_pieces(store, entry):
            whole.update(data)
            _update_tensors(parts, rows, data, offset)
            on_bytes(len(data))
    except NotFound:
        return [_describe_missing(entry, rows)]
    except StoreError as error:
        return [Exception.__str__(error)]
    if whole.hexdigest() == entry.digest:
        return []
    damaged = [row for row in rows if parts[id(row)].hexdigest() != row.digest]
    if not damaged:
        return [f"{entry.key} ({entry.shard}): damaged outside of its tensors, in the header"]
    return [_describe_damage(entry, row) for row in damaged]


def _describe_damage(entry: ObjectEntry, row: StoredRow) -> str:
    return f"{entry.key}: {_describe(row)}: damaged within bytes {row.offset} to {row.offset + row.num_bytes}"


def _describe_size(entry: ObjectEntry, rows: list[StoredRow], found: int) -> str:
    """Say how long an object is and should be, and which tensor is the first that is not whole."""
    lost = sorted((row for row in rows if row.offset + row.num_bytes > found), key=lambda row: row.offset)
    tail = f"; {_describe(lost[0])} breaks off at byte {found} (of {len(lost)} tensors that are not whole)" if lost else _held(rows)
    return f"{entry.key} ({entry.shard}): has {found:,} bytes, the manifest says {entry.num_bytes:,}{tail}"


def _describe_missing(entry: ObjectEntry, rows: list[StoredRow]) -> str:
    return f"{entry.key} ({entry.shard}): is missing{_held(rows)}"


def _held(rows: list[StoredRow]) -> str:
    names = sorted({row.name for row in rows})
    return f"; it holds {names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "") if names else ""


def _describe(row: StoredRow) -> str:
    return f"{row.name} ({row.role}{' of ' + row.expert if row.expert else ''})"


def _read_pieces(store: Store, entry: ObjectEntry) -> Iterator[tuple[int, memoryview]]:
    for offset in range(0, entry.num_bytes, READ_BYTES):
        yield (
            offset,
            store.read_forward(
                entry.key, offset=offset, num_bytes=min(READ_BYTES, entry.num_bytes - offset), start=0, stop=entry.num_bytes
            ),
        )


def _update_tensors(parts: dict[int, blake3], rows: list[StoredRow], data: memoryview, offset: int) -> None:
    for row in rows:
        begin, stop = max(row.offset, offset), min(row.offset + row.num_bytes, offset + len(data))
        if begin < stop:
            parts[id(row)].update(data[begin - offset : stop - offset])
