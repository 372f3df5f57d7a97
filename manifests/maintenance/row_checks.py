"""Consistency of each row of a table: with itself, with its object, and with the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import comb, prod

from mmerge.manifests.format.entry import ObjectEntry, TensorRow, TensorStatistics
from mmerge.manifests.format.manifest import Manifest
from mmerge.manifests.format.object_header import (
    describe_row,
    make_object_header,
    name_in_object,
    packed_bytes,
)
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.format.table import StoredRow, group_of, group_rows

_ROLES_OF_OBJECT = {
    "base": ("base",),
    "merge": ("delta", "mask", "merged"),
    "carry": ("carried", "extra_rows", "adapter"),
}
_ROLES_OF_KIND = {
    "masks": ("base", "delta", "mask", "carried", "extra_rows"),
    "plain": ("base", "merged", "carried", "extra_rows"),
    "adapters": ("base", "carried", "adapter"),
}
_OF_EXPERT = ("mask", "carried", "extra_rows", "adapter")
_COUNTS = ("num_kept", "num_agreeing", "num_masked")


def find_row_faults(manifest: Manifest, rows: Sequence[StoredRow]) -> Iterator[str]:
    """Yield the contradictions of single rows and of the rows of each object, as sentences."""
    groups = group_rows(rows)
    entries = {group_of(entry): entry for entry in manifest.entries}
    for key, shard in groups.keys() - entries.keys():
        yield f"it has rows of {key} as shard {shard}, the manifest has no such entry"
    for group, entry in entries.items():
        object_rows = groups.get(group, [])
        if not object_rows:
            yield f"it has no rows of {entry.key} (shard {entry.shard})"
            continue
        reasons = []
        for row in object_rows:
            reason = find_shape_fault(row) or _find_role_fault(manifest, entry, row)
            reason = reason or find_statistics_fault(row, num_experts=len(manifest.experts))
            if reason:
                reasons.append(f"{describe_row(row)} {reason}")
        yield from reasons
        if not reasons:
            yield from _find_offset_faults(entry, object_rows, method=manifest.method)


def find_shape_fault(row: TensorRow) -> str:
    """Return what is wrong with dtype, shape, rows and size of a row, or nothing."""
    if row.dtype not in DTYPE_BYTES:
        return f"has dtype {row.dtype}, which no tensor of a build has"
    if any(size < 0 for size in row.shape) or row.row_start < 0:
        return f"has shape {row.shape} from row {row.row_start} on"
    num_rows = row.shape[0] if row.shape else 1
    if row.row_stop - row.row_start != num_rows:
        return f"has shape {row.shape} in rows {row.row_start} to {row.row_stop}"
    if row.role != "mask":
        num_bytes = prod(row.shape) * DTYPE_BYTES[row.dtype]
        if row.num_bytes != num_bytes:
            return f"has {row.num_bytes:,} bytes, {row.dtype} {row.shape} takes {num_bytes:,}"
        return ""
    num_bytes = packed_bytes(prod(row.shape))
    if row.dtype != "U8" or row.num_bytes != num_bytes:
        return (
            f"of shape {row.shape} has {row.num_bytes:,} bytes of {row.dtype}, packed bits of it"
            f" take {num_bytes:,}"
        )
    return ""


def _find_role_fault(manifest: Manifest, entry: ObjectEntry, row: StoredRow) -> str:
    if row.role not in _ROLES_OF_OBJECT[entry.role]:
        return f"is in {entry.key}, an object of role {entry.role}"
    if row.role not in _ROLES_OF_KIND[manifest.kind]:
        return f"is in a build of kind {manifest.kind}"
    if row.role not in _OF_EXPERT and row.expert:
        return f"has an expert, tensors of role {row.role} have none"
    if row.role in _OF_EXPERT and row.expert not in [expert.name for expert in manifest.experts]:
        return f"is of expert {row.expert!r}, which the manifest does not have"
    if entry.role == "carry" and row.expert != entry.expert:
        return f"is in {entry.key}, which is of expert {entry.expert!r}"
    if row.role in ("delta", "merged") and row.dtype != manifest.dtype:
        return f"has dtype {row.dtype}, the manifest says {manifest.dtype}"
    return ""


def _find_offset_faults(
    entry: ObjectEntry, rows: Sequence[StoredRow], *, method: str
) -> Iterator[str]:
    """Compare positions: without gap or overlap from the end of the header to that of the object.

    Where the header ends follows from the rows.
    """
    ordered = sorted(rows, key=lambda row: (row.offset, row.num_bytes))
    names = {name_in_object(row) for row in rows}
    if len(names) < len(rows):
        yield f"two rows of {entry.key} have one name"
        return
    start = len(make_object_header(entry, rows, method=method))
    if ordered[0].offset != start:
        yield (
            f"{describe_row(ordered[0])} begins at byte {ordered[0].offset} of {entry.key}, whose"
            f" header ends at {start}"
        )
    for left, right in pairwise(ordered):
        end = left.offset + left.num_bytes
        if right.offset != end:
            yield (
                f"{describe_row(right)} begins at byte {right.offset} of {entry.key},"
                f" {describe_row(left)} before it ends at {end}"
            )
    end = ordered[-1].offset + ordered[-1].num_bytes
    if end != entry.num_bytes:
        yield (
            f"{describe_row(ordered[-1])} ends at byte {end} of {entry.key}, which has"
            f" {entry.num_bytes:,} bytes by the manifest"
        )


def find_statistics_fault(row: TensorRow, *, num_experts: int) -> str:
    """Return what is wrong with the statistics of a row, or nothing."""
    statistics = row.statistics
    if row.role not in ("delta", "mask", "merged"):
        return "has statistics, copied tensors have none" if statistics else ""
    if statistics is None:
        return "has no statistics"
    if statistics.num_entries != prod(row.shape):
        return f"has statistics of {statistics.num_entries:,} entries in shape {row.shape}"
    expected_fields = {
        "delta": {"num_entries", "consensus", "overlaps"},
        "mask": {"num_entries", *_COUNTS},
        "merged": {"num_entries"},
    }[row.role]
    fields = {name for name, value in statistics if value is not None}
    fields -= {"delta_norm"} if row.role == "delta" else set()
    fields -= {"task_vector_norm"} if row.role == "mask" else set()
    if fields != expected_fields:
        return f"has the statistics {sorted(fields)}, expected {sorted(expected_fields)}"
    return _find_count_fault(statistics, num_experts=num_experts)


def _find_count_fault(statistics: TensorStatistics, *, num_experts: int) -> str:
    num_entries = statistics.num_entries
    for norm in (statistics.delta_norm, statistics.task_vector_norm):
        if norm is not None and norm < 0:
            return f"has a norm of {norm}"
    if statistics.num_kept is not None:
        kept, agreeing = statistics.num_kept, statistics.num_agreeing or 0
        masked = statistics.num_masked or 0
        if not (0 <= agreeing <= kept <= num_entries and 0 <= masked <= num_entries):
            return (
                f"counts {masked:,} masked, {agreeing:,} agreeing and {kept:,} kept of"
                f" {num_entries:,} entries"
            )
    consensus = statistics.consensus
    if consensus is None:
        return ""
    overlaps = statistics.overlaps or ()
    if len(consensus) != num_experts + 1 or len(overlaps) != comb(num_experts, 2):
        return (
            f"has a consensus of {len(consensus)} and overlaps of {len(overlaps)} counts for"
            f" {num_experts} experts"
        )
    if min(consensus) < 0 or sum(consensus) != num_entries:
        return f"has a consensus of {sum(consensus):,} entries in all, of {num_entries:,}"
    num_pairs = sum(comb(votes, 2) * count for votes, count in enumerate(consensus))
    if min(overlaps, default=0) < 0 or sum(overlaps) != num_pairs:
        return (
            f"has overlaps of {sum(overlaps):,} entries in all, its consensus gives {num_pairs:,}"
        )
    return ""
