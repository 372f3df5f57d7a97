"""The one check of a build that every command makes before it uses one.

Two levels are here, the third, the bytes of all objects, is in verify.py:

- `records`: the reference, the manifest and the table, held against each other. Nothing else is
  read.
- `structure`: in addition the entry, the size and the header of every object, and the size of every
  file. Two small reads per object.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from mmerge.manifests.digest import SHOWN_DIGITS
from mmerge.manifests.errors import ManifestError, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.format.entry import (
    ObjectEntry,
    ShardEntry,
    TensorRow,
    digest_of_object,
    entry_key,
    read_entry,
)
from mmerge.manifests.format.manifest import (
    FileEntry,
    Manifest,
    digest_manifest,
    manifest_key,
    read_manifest,
)
from mmerge.manifests.format.object_header import (
    describe_held,
    describe_missing,
    describe_row,
    find_header_damage,
)
from mmerge.manifests.format.publish import find_whole_manifest
from mmerge.manifests.format.references import (
    Reference,
    list_references,
    open_reference,
    read_reference,
)
from mmerge.manifests.format.table import StoredRow, group_of, group_rows, read_table
from mmerge.manifests.maintenance.damage import Damage, make_error
from mmerge.manifests.maintenance.manifest_checks import find_manifest_damages
from mmerge.manifests.maintenance.row_checks import find_row_faults, find_shape_fault
from mmerge.manifests.maintenance.tensor_checks import find_tensor_faults, group_pieces
from mmerge.manifests.stores.base import ReadableStore

Level = Literal["records", "structure"]
CONCURRENT_READS = 16
"""Objects of a remote store whose entry and header are read at once."""
Item = TypeVar("Item")


@dataclass(frozen=True)
class CheckedBuild:
    """A build whose records were read and held against each other."""

    uri: str
    store: ReadableStore
    manifest: Manifest
    rows: tuple[StoredRow, ...]
    """All rows of the table, with statistics."""

    @property
    def build(self) -> str:
        """The digest of the build."""
        return self.manifest.build


def open_checked_build(uri: str, *, level: Level) -> CheckedBuild:
    """Return the build at `uri` once it has been checked.

    Raises:
        StoreError: the store cannot be read.
        ManifestError: there is no such build, or its manifest or table cannot be parsed.
        DamagedObject: its parts contradict each other; the message lists all contradictions.
    """
    checked, damages = check_build(uri, level=level)
    if damages:
        raise make_error(uri, [damage.sentence for damage in damages])
    return checked


def check_build(uri: str, *, level: Level) -> tuple[CheckedBuild, list[Damage]]:
    """Return the build at `uri`, and where its parts contradict each other.

    Raises:
        StoreError: the store cannot be read.
        ManifestError: there is no such build, or its manifest or table cannot be parsed.
    """
    store, build, reference = open_reference(uri)
    manifest = read_manifest(store, build)
    rows = tuple(read_table(store, manifest.table))
    checked = CheckedBuild(uri, store, manifest, rows)
    damages = find_record_damages(manifest, rows)
    references = [reference] if reference is not None else _find_references(store, build)
    for reference in references:
        # Of several references that a manifest contradicts, the first says it.
        reference_damages = find_reference_damages(reference, manifest)
        if reference_damages:
            damages += reference_damages
            break
    if level == "structure":
        damages += find_stored_damages(store, manifest, rows)
    return checked, damages


def find_committed_damages(store: ReadableStore, build: str) -> list[Damage] | None:
    """Return the damages of a build's structure, None if it has no manifest of its own fields.

    Raises:
        UnknownVersion: another version of mmerge wrote the manifest.
        StoreUnavailable: the store does not answer.
    """
    manifest = find_whole_manifest(store, build)
    if manifest is None:
        return None
    try:
        rows = read_table(store, manifest.table)
    except StoreUnavailable:
        raise
    except (ManifestError, StoreError) as error:
        return [Damage(manifest.table.key, Exception.__str__(error))]
    damages = find_record_damages(manifest, rows)
    return damages + find_stored_damages(store, manifest, rows)


def find_record_damages(manifest: Manifest, rows: Sequence[StoredRow]) -> list[Damage]:
    """Return where manifest and table contradict themselves or each other."""
    faults = [*find_row_faults(manifest, rows)]
    faults += find_tensor_faults(manifest, group_pieces(rows))
    damages = find_manifest_damages(manifest)
    key = manifest.table.key
    damages += [Damage(key, f"{key}: the table contradicts itself: {fault}") for fault in faults]
    return damages


def find_reference_damages(reference: Reference, manifest: Manifest) -> list[Damage]:
    """Return how a manifest differs from the one to which a reference was made."""
    digest = digest_manifest(manifest)
    if reference.manifest in (None, digest):
        return []
    key = manifest_key(manifest.build)
    sentence = (
        f"{key}: its digest is {digest[:SHOWN_DIGITS]}, {reference.key} says"
        f" {str(reference.manifest)[:SHOWN_DIGITS]}: it was changed after it was named"
    )
    return [Damage(key, sentence)]


def _find_references(store: ReadableStore, build: str) -> list[Reference]:
    """Return the references to a build that is opened by its digest, except damaged ones.

    The digest covers all fields of a manifest but the provenance of its objects (`inputs`), which
    only references cover.

    Raises:
        StoreUnavailable: the store does not answer.
    """

    def read(name: str, number: int) -> list[Reference]:
        try:
            return [read_reference(store, name, number)]
        except StoreUnavailable:
            raise
        except (ManifestError, StoreError):
            return []  # damaged, or deleted meanwhile; `verify` reports those of its names

    reads: list[Callable[[], list[Reference]]] = []
    for name, numbers in list_references(store).items():
        reads += [partial(read, name, number) for number in numbers]
    references: list[Reference] = []
    for reference in run_reads(store, reads):
        references += reference
    return [reference for reference in references if reference.build == build]


def find_stored_damages(
    store: ReadableStore, manifest: Manifest, rows: Sequence[StoredRow]
) -> list[Damage]:
    """Return where entries, sizes and headers of objects, or sizes of files, differ.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    groups = group_rows(rows)
    # An object that two shards share is checked once, its entry against the rows of both.
    objects = {entry.key: entry for entry in manifest.entries}
    checks: list[Callable[[], list[Damage]]] = []
    for entry in objects.values():
        object_rows = groups.get(group_of(entry), [])
        checks.append(partial(_check_object, store, entry, object_rows, manifest.method))
    sharers: defaultdict[str, list[tuple[ObjectEntry, Sequence[TensorRow]]]] = defaultdict(list)
    for entry in manifest.entries:
        sharers[entry.key].append((entry, groups.get(group_of(entry), [])))
    checks += [partial(_check_entry, store, labelled) for labelled in sharers.values()]
    checks += [partial(_check_file, store, file) for file in manifest.unique_files()]
    damages: list[Damage] = []
    for reasons in run_reads(store, checks):
        damages += reasons
    return damages


def run_reads(store: ReadableStore, reads: Iterable[Callable[[], Item]]) -> Iterator[Item]:
    """Yield the results of small reads in their order; those of a remote store concurrently."""
    if not store.is_remote:
        for read in reads:
            yield read()
        return
    with ThreadPoolExecutor(CONCURRENT_READS) as pool:
        yield from pool.map(lambda read: read(), reads)


def _check_object(
    store: ReadableStore, entry: ObjectEntry, rows: Sequence[TensorRow], method: str
) -> list[Damage]:
    if any(find_shape_fault(row) for row in rows):
        return []  # no header follows from such rows, and they are reported as they are
    try:
        sentence = find_header_damage(store, entry, rows, method=method)
    except StoreUnavailable:
        raise
    except NotFound:
        sentence = describe_missing(entry, rows)
    except StoreError as error:
        sentence = f"{Exception.__str__(error)}{describe_held(rows)}"
    return [Damage(entry.key, sentence)] if sentence else []


def _check_file(store: ReadableStore, file: FileEntry) -> list[Damage]:
    try:
        num_bytes = store.num_bytes(file.key)
    except StoreUnavailable:
        raise
    except NotFound:
        return [Damage(file.key, f"{file.key} ({file.name}): is missing")]
    except StoreError as error:
        return [Damage(file.key, Exception.__str__(error))]
    if num_bytes == file.num_bytes:
        return []
    sentence = (
        f"{file.key} ({file.name}): has {num_bytes:,} bytes, the manifest says {file.num_bytes:,}"
    )
    return [Damage(file.key, sentence)]


def _check_entry(
    store: ReadableStore, sharers: Sequence[tuple[ObjectEntry, Sequence[TensorRow]]]
) -> list[Damage]:
    """Compare the entry of an object with the manifest and with the rows of each of its shards."""
    digest = digest_of_object(sharers[0][0].key)
    key = entry_key(digest)
    try:
        stored = read_entry(store, digest)
    except StoreUnavailable:
        raise
    except (ManifestError, StoreError) as error:
        return [Damage(key, Exception.__str__(error))]
    if stored is None:
        sentence = f"{key}: is missing: nothing says that {sharers[0][0].key} is complete"
        return [Damage(key, sentence)]
    damages = []
    for entry, rows in sharers:
        reason = find_entry_fault(stored, entry, rows)
        if reason:
            damages.append(Damage(key, f"{key} ({entry.shard}): {reason}"))
    return damages


def find_entry_fault(
    stored: ShardEntry, entry: ObjectEntry, rows: Sequence[TensorRow]
) -> str | None:
    """Return how the entry of an object differs from manifest and table, None if it does not.

    Shard and expert are those of the build that made the object first, and may differ.
    """
    for field in ("key", "role", "num_bytes", "digest"):
        in_entry, in_manifest = getattr(stored.object, field), getattr(entry, field)
        if in_entry != in_manifest:
            return f"{field} is {in_entry}, the manifest says {in_manifest}"
    if len(stored.tensors) != len(rows):
        return f"lists {len(stored.tensors)} tensors, the table {len(rows)}"
    ordered = sorted(rows, key=_order)
    for tensor, row in zip(sorted(stored.tensors, key=_order), ordered, strict=True):
        for field in TensorRow.model_fields:
            in_entry, in_table = getattr(tensor, field), getattr(row, field)
            if field == "expert" and not in_entry:
                in_entry = entry.expert
            if in_entry != in_table:
                return f"{describe_row(row)}: {field} is {in_entry}, the table says {in_table}"
    return None


def _order(row: TensorRow) -> tuple[int, int, str]:
    return row.offset, row.num_bytes, row.name
