"""Write the object of a merge or copy task; a stored object is compared, never replaced.

The bytes of an object follow from its key on one machine. They can differ between two: by another
version of a library, or by another processor. Builds list an object with the digest of its bytes,
so an object that is there stays as it is, and is only ever repaired with the bytes that it had.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mmerge.manifests.format.entry import (
    ObjectEntry,
    ShardEntry,
    TensorRow,
    entry_key,
    find_entry,
    object_key,
    write_entry,
)
from mmerge.manifests.format.object_header import describe_row, find_header_damage
from mmerge.manifests.format.stored_objects import find_listings, find_object_damage
from mmerge.manifests.maintenance.row_checks import find_statistics_fault
from mmerge.manifests.maintenance.verify import ObjectReader
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.writer import DiscardingSink, ObjectWriter
from mmerge.workers.task import CopyTask, MergeTask, TaskResult

WriteTensors = Callable[[ObjectWriter], Sequence[TensorRow]]
"""Computes the object and writes it, header first; returns the rows of its tensors."""

log = logging.getLogger("mmerge.run")


class _OtherBytes(Exception):
    """The computed bytes differ from the published ones: the writer must not commit them."""


@dataclass
class _Output:
    """What was computed."""

    rows: Sequence[TensorRow] = ()
    num_bytes: int = 0
    digest: str = ""


@dataclass(frozen=True)
class _Published:
    """What the store says of the object of a task."""

    stored_entry: ShardEntry | None = None
    """Its entry, if that can be read and no build contradicts it."""
    digest: str | None = None
    """The digest that its bytes must have; None where no build lists the object yet."""
    is_whole: bool = False
    """Whether the object has that digest (compared by size only, unless the task is `fresh`)."""
    damaged_keys: tuple[str, ...] = ()


def store_object(
    task: MergeTask | CopyTask, store: Store, write_tensors: WriteTensors
) -> TaskResult:
    """Return the result of a task whose object is in the store afterwards.

    A whole object of an earlier run is reused. With `task.fresh` it is computed again and compared,
    and the result names the tensors that differ. A missing or damaged object is written again if
    the computed bytes are those that it had, or if no build lists it.
    """
    start_time = time.monotonic()
    initial_entry = find_entry(store, task.digest)
    published = _find_published(task, store, initial_entry)
    stored_entry = published.stored_entry
    if stored_entry is not None and published.is_whole and not task.fresh:
        return TaskResult(task.shard, 0, True, time.monotonic() - start_time, stored_entry)
    if published.is_whole:
        output = _compute_only(task, write_tensors)
        expected = published.digest
    else:
        output, expected = _write_object(
            task, store, write_tensors, expected=published.digest, initial_entry=initial_entry
        )
    entry = _make_entry(task, output)
    differing: tuple[str, ...] = ()
    damaged_keys = published.damaged_keys
    if expected not in (None, output.digest):
        differing = _find_differing(initial_entry, output.rows)
    elif stored_entry is None or stored_entry.tensors != entry.tensors:
        # Equal objects have equal tensors: an entry with others is damaged.
        write_entry(store, task.digest, entry)
        if stored_entry is not None:
            damaged_keys = (*damaged_keys, entry_key(task.digest))
        stored_entry = entry
    return TaskResult(
        task.shard,
        task.num_bytes,
        False,
        time.monotonic() - start_time,
        stored_entry or entry,
        differing=differing,
        repaired=() if differing else damaged_keys,
    )


def _find_published(
    task: MergeTask | CopyTask, store: Store, entry: ShardEntry | None
) -> _Published:
    key = object_key(task.digest)
    if entry is None and not store.exists(key):
        return _Published()
    if entry is not None:
        damage = find_object_damage(store, entry.object, read=task.fresh or task.verify_reused)
        if damage is None and entry.checksum is None and not task.fresh:
            return _verify_unchecked(task, store, entry)
        if damage is None:
            return _Published(entry, entry.object.digest, is_whole=True)
        log.warning("%s: %s (%s): %s; it is computed again", store.uri, key, task.shard, damage)
    listed = {listing.entry.digest: listing.entry for listing in find_listings(store, key)}
    if not listed:
        # No build depends on it: what a killed run left, say.
        return _Published(damaged_keys=() if entry is None else (key,))
    if entry is not None and entry.object.digest in listed:
        return _Published(entry, entry.object.digest, damaged_keys=(key,))
    listed_entry = next(iter(listed.values()))
    if find_object_damage(store, listed_entry, read=True) is None:
        return _Published(
            None, listed_entry.digest, is_whole=True, damaged_keys=(entry_key(task.digest),)
        )
    return _Published(None, listed_entry.digest, damaged_keys=(key, entry_key(task.digest)))


def _verify_unchecked(task: MergeTask | CopyTask, store: Store, entry: ShardEntry) -> _Published:
    """Return the state of an object whose entry has no checksum, as version 0.1 wrote them.

    Object and entry are compared byte by byte, once: the entry gets a checksum, or is damaged.
    """
    method = task.method if isinstance(task, MergeTask) else ""
    num_experts = len(task.expert_names) if isinstance(task, MergeTask) else 0
    damages: list[str | None] = [
        find_header_damage(store, entry.object, entry.tensors, method=method),
        *(find_statistics_fault(row, num_experts=num_experts) for row in entry.tensors),
        *ObjectReader(store).check_object(entry.object, entry.tensors),
    ]
    reasons = [damage for damage in damages if damage]
    if not reasons:
        write_entry(store, task.digest, entry)
        return _Published(entry, entry.object.digest, is_whole=True)
    key = entry_key(task.digest)
    log.warning("%s: %s (%s): %s; it is computed again", store.uri, key, task.shard, reasons[0])
    is_whole = find_object_damage(store, entry.object, read=True) is None
    keys = (key,) if is_whole else (object_key(task.digest), key)
    return _Published(None, entry.object.digest, is_whole=is_whole, damaged_keys=keys)


def _write_object(
    task: MergeTask | CopyTask,
    store: Store,
    write_tensors: WriteTensors,
    *,
    expected: str | None,
    initial_entry: ShardEntry | None,
) -> tuple[_Output, str | None]:
    """Write the object, unless other bytes are expected there.

    Returns:
        What was computed, and the digest that was expected, None for any.
    """
    output = _Output()
    try:
        with store.open_writer(object_key(task.digest)) as out:
            _fill(output, out, write_tensors)
            if expected is None:
                # Another builder may have finished the same object meanwhile.
                late_entry = find_entry(store, task.digest)
                if late_entry is not None and late_entry != initial_entry:
                    expected = late_entry.object.digest
            if expected not in (None, output.digest):
                raise _OtherBytes
    except _OtherBytes:
        pass
    return output, expected


def _compute_only(task: MergeTask | CopyTask, write_tensors: WriteTensors) -> _Output:
    """Compute the object without storing it."""
    output = _Output()
    with ObjectWriter(object_key(task.digest), DiscardingSink()) as out:
        _fill(output, out, write_tensors)
    return output


def _fill(output: _Output, out: ObjectWriter, write_tensors: WriteTensors) -> None:
    output.rows = tuple(write_tensors(out))
    output.num_bytes = out.num_bytes
    output.digest = out.hexdigest()


def _make_entry(task: MergeTask | CopyTask, output: _Output) -> ShardEntry:
    role: Literal["base", "merge", "carry"] = "merge"
    expert = ""
    if isinstance(task, CopyTask):
        role, expert = task.role, task.expert
    return ShardEntry(
        object=ObjectEntry(
            key=object_key(task.digest),
            shard=task.shard,
            role=role,
            expert=expert,
            num_bytes=output.num_bytes,
            digest=output.digest,
        ),
        tensors=tuple(output.rows),
    )


def _find_differing(entry: ShardEntry | None, rows: Sequence[TensorRow]) -> tuple[str, ...]:
    """Return the tensors whose computed bytes differ from those of a stored entry."""
    if entry is None:
        return tuple(describe_row(row) for row in rows)
    stored = {(row.name, row.role, row.expert, row.row_start): row.digest for row in entry.tensors}
    differing = [
        describe_row(row)
        for row in rows
        if stored.get((row.name, row.role, row.expert, row.row_start)) != row.digest
    ]
    return tuple(differing) or ("the header of the object",)
