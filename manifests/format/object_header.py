"""The header of a stored object: nothing in it is free, so a reader makes it from manifest and
table and compares every byte.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from mmerge.manifests.format.entry import ObjectEntry, TensorRow
from mmerge.manifests.format.safetensors_header import make_header
from mmerge.manifests.stores.base import ReadableStore


def delta_name(name: str) -> str:
    """Return the name of τ⋆ of a tensor within its object."""
    return f"{name}.delta"


def mask_name(name: str, expert: str) -> str:
    """Return the name of an expert's packed mask of a tensor within its object."""
    return f"{name}.mask.{expert}"


def make_metadata(
    digest: str, *, role: Literal["base", "merge", "carry"], method: str
) -> dict[str, str]:
    """Return the metadata in the header of the object of this digest; `method` made it if its role
    is `merge`.
    """
    return (
        {"mmerge": digest, "method": method}
        if role == "merge"
        else {"mmerge": digest, "role": role}
    )


def make_object_header(entry: ObjectEntry, rows: Sequence[TensorRow], *, method: str) -> bytes:
    """Return the first bytes of an object, up to its first tensor.

    Args:
        entry: the object, in the manifest.
        rows: its tensors, those of `entry.shard` in the table.
        method: the manifest's.
    """
    layout = [
        (_name_in_object(row), row.dtype, [row.num_bytes] if row.role == "mask" else row.shape)
        for row in sorted(rows, key=lambda row: (row.offset, row.num_bytes))
    ]
    digest = entry.key.rpartition("/")[2].partition(".")[0]
    return make_header(layout, metadata=make_metadata(digest, role=entry.role, method=method))[0]


def find_header_damage(
    store: ReadableStore, entry: ObjectEntry, rows: Sequence[TensorRow], *, method: str
) -> str | None:
    """Return how the size or the header of an object differs from what manifest and table say; None
    where neither does.

    Raises:
        NotFound: the object is missing.
        StoreError: it cannot be read.
    """
    wanted = make_object_header(entry, rows, method=method)
    found, num_bytes = store.read_start(entry.key, num_bytes=len(wanted))
    if num_bytes != entry.num_bytes:
        return describe_size(entry, rows, num_bytes)
    if found == wanted:
        return None
    at = next(
        (at for at, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other),
        min(len(found), len(wanted)),
    )
    owner = _find_owner(wanted, rows, at)
    return f"{entry.key} ({entry.shard}): its header is damaged at byte {at}" + (
        f", where it describes {describe_row(owner)}" if owner else describe_held(rows)
    )


def describe_size(entry: ObjectEntry, rows: Sequence[TensorRow], found: int) -> str:
    """Say how long an object is and should be, and which tensor is the first that is not whole."""
    lost = sorted(
        (row for row in rows if row.offset + row.num_bytes > found), key=lambda row: row.offset
    )
    tail = (
        f"; {describe_row(lost[0])} breaks off at byte {found} (of {len(lost)} tensors that are not"
        " whole)"
        if lost
        else describe_held(rows)
    )
    return (
        f"{entry.key} ({entry.shard}): has {found:,} bytes, the manifest says"
        f" {entry.num_bytes:,}{tail}"
    )


def describe_held(rows: Sequence[TensorRow]) -> str:
    """Say which tensors an object holds, to be put behind a sentence."""
    names = sorted({row.name for row in rows})
    return (
        f"; it holds {names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
        if names
        else ""
    )


def describe_row(row: TensorRow) -> str:
    """Name a stored tensor for people."""
    return f"{row.name} ({row.role}{' of ' + row.expert if row.expert else ''})"


def _name_in_object(row: TensorRow) -> str:
    if row.role == "mask":
        return mask_name(row.name, row.expert)
    return delta_name(row.name) if row.role == "delta" else row.name


def _find_owner(header: bytes, rows: Sequence[TensorRow], at: int) -> TensorRow | None:
    """Return the tensor that byte `at` of a header is about, None where it is about the whole
    object.
    """
    for row in rows:
        name = json.dumps(_name_in_object(row), ensure_ascii=False)
        begin = header.find(f'{name}:{{"data_offsets"'.encode())
        if begin >= 0 and begin <= at <= header.find(b"}", begin):
            return row
    return None
