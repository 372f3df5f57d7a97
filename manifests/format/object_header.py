"""Headers of stored objects: fully determined by manifest and table, so every byte is checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from mmerge.manifests.format.entry import ObjectEntry, TensorRow
from mmerge.manifests.format.safetensors_header import make_header
from mmerge.manifests.stores.base import ReadableStore

WORD_BYTES = 8
"""Packed masks end on a multiple of this, which keeps the next tensor in the file aligned."""


def packed_bytes(num_entries: int) -> int:
    """Return the size of a packed mask in bytes."""
    return -(-num_entries // (8 * WORD_BYTES)) * WORD_BYTES


def delta_name(name: str) -> str:
    """Return the name of τ⋆ of a tensor within its object."""
    return f"{name}.delta"


def mask_name(name: str, expert: str) -> str:
    """Return the name of an expert's packed mask of a tensor within its object."""
    return f"{name}.mask.{expert}"


def make_metadata(
    digest: str, *, role: Literal["base", "merge", "carry"], method: str
) -> dict[str, str]:
    """Return the header metadata of an object; `method` is used for role `merge` only."""
    if role == "merge":
        return {"mmerge": digest, "method": method}
    return {"mmerge": digest, "role": role}


def make_object_header(entry: ObjectEntry, rows: Sequence[TensorRow], *, method: str) -> bytes:
    """Return the header of an object: its first bytes, up to its first tensor.

    Args:
        entry: the object, from the manifest.
        rows: its tensors, the rows of `entry.shard` in the table.
        method: the method, from the manifest.
    """
    layout = [
        (name_in_object(row), row.dtype, [row.num_bytes] if row.role == "mask" else row.shape)
        for row in sorted(rows, key=lambda row: (row.offset, row.num_bytes))
    ]
    digest = entry.key.rpartition("/")[2].partition(".")[0]
    return make_header(layout, metadata=make_metadata(digest, role=entry.role, method=method))[0]


def find_header_damage(
    store: ReadableStore, entry: ObjectEntry, rows: Sequence[TensorRow], *, method: str
) -> str | None:
    """Return how size or header of an object differ from manifest and table, None if they do not.

    Raises:
        NotFound: the object is missing.
        StoreError: it cannot be read.
    """
    expected = make_object_header(entry, rows, method=method)
    header, num_bytes = store.read_start(entry.key, num_bytes=len(expected))
    if num_bytes != entry.num_bytes:
        return describe_size(entry, rows, num_bytes)
    if header == expected:
        return None
    at = _first_difference(header, expected)
    row = _find_described_row(expected, rows, at)
    content = f", where it describes {describe_row(row)}" if row else describe_held(rows)
    return f"{entry.key} ({entry.shard}): its header is damaged at byte {at}{content}"


def _first_difference(data: memoryview, expected: bytes) -> int:
    for at, (byte, expected_byte) in enumerate(zip(data, expected, strict=False)):
        if byte != expected_byte:
            return at
    return min(len(data), len(expected))


def describe_size(entry: ObjectEntry, rows: Sequence[TensorRow], num_bytes: int) -> str:
    """Return a sentence on an object of the wrong size, with the first tensor that it truncates."""
    truncated = [row for row in rows if row.offset + row.num_bytes > num_bytes]
    if truncated:
        first = min(truncated, key=lambda row: row.offset)
        content = (
            f"; {describe_row(first)} breaks off at byte {num_bytes} (of {len(truncated)} tensors"
            " that are not whole)"
        )
    else:
        content = describe_held(rows)
    return (
        f"{entry.key} ({entry.shard}): has {num_bytes:,} bytes, the manifest says"
        f" {entry.num_bytes:,}{content}"
    )


def describe_missing(entry: ObjectEntry, rows: Sequence[TensorRow]) -> str:
    """Return a sentence on a missing object, with what it held."""
    return f"{entry.key} ({entry.shard}): is missing{describe_held(rows)}"


def describe_held(rows: Sequence[TensorRow]) -> str:
    """Return which tensors an object holds, as the end of a sentence."""
    names = sorted({row.name for row in rows})
    if not names:
        return ""
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"; it holds {names[0]}{more}"


def describe_row(row: TensorRow) -> str:
    """Return the name of a stored tensor for messages."""
    expert = f" of {row.expert}" if row.expert else ""
    return f"{row.name} ({row.role}{expert})"


def name_in_object(row: TensorRow) -> str:
    """Return the name of a stored tensor in the header of its object."""
    if row.role == "mask":
        return mask_name(row.name, row.expert)
    return delta_name(row.name) if row.role == "delta" else row.name


def _find_described_row(header: bytes, rows: Sequence[TensorRow], at: int) -> TensorRow | None:
    """Return the tensor that byte `at` of a header describes, None outside of all tensors."""
    for row in rows:
        name = json.dumps(name_in_object(row), ensure_ascii=False)
        begin = header.find(f'{name}:{{"data_offsets"'.encode())
        if 0 <= begin <= at <= header.find(b"}", begin):
            return row
    return None
