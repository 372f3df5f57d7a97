"""Consistency of a build's table, checked before memory is allocated and bytes are read from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import prod

from mmerge.manifests.errors import ManifestError
from mmerge.manifests.format.table import StoredRow
from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES
from mmerge.workers.reconstruction.bitmask import packed_bytes

Key = tuple[str, str, str]
"""Role, expert and name of a tensor."""


def check_rows(pieces: Mapping[Key, Sequence[StoredRow]], *, uri: str) -> None:
    """Check that the pieces of each tensor are contiguous, and θ₀, τ⋆ and masks of one shape.

    Neither headers nor digests of objects show such a fault.

    Args:
        pieces: rows of each tensor, sorted by their first row.
        uri: the build's, for messages.

    Raises:
        ManifestError: the table contradicts itself.
    """
    shapes: dict[Key, tuple[int, ...]] = {}
    for key, rows in pieces.items():
        reasons = [_find_row_fault(row) for row in rows]
        reasons.append("" if any(reasons) else _find_tensor_fault(rows))
        for reason in filter(None, reasons):
            raise _contradiction(uri, key, reason)
        shapes[key] = ()
        if rows[0].shape:
            shapes[key] = (sum(row.shape[0] for row in rows), *rows[0].shape[1:])
    for (role, expert, name), shape in shapes.items():
        if role not in ("delta", "mask"):
            continue
        base_shape = shapes.get(("base", "", name), "missing")
        if base_shape != shape:
            reason = f"has shape {shape}, θ₀ of that name {base_shape}"
            raise _contradiction(uri, (role, expert, name), reason)


def _contradiction(uri: str, key: Key, reason: str) -> ManifestError:
    role, expert, name = key
    owner = f" of expert {expert!r}" if expert else ""
    return ManifestError(
        f"{uri}: the table contradicts itself: {name} ({role}{owner}) {reason}. The build is"
        " damaged: run the recipe again"
    )


def _find_row_fault(row: StoredRow) -> str:
    """Return what is wrong with a row, or nothing."""
    if row.dtype not in TORCH_DTYPES:
        return f"has dtype {row.dtype}, which no tensor of a build has"
    if any(size < 0 for size in row.shape) or row.row_start < 0:
        return f"has shape {row.shape} from row {row.row_start} on"
    if row.shape and row.row_stop - row.row_start != row.shape[0]:
        return f"has shape {row.shape} in rows {row.row_start} to {row.row_stop}"
    if row.role == "mask" and (row.dtype != "U8" or row.num_bytes != packed_bytes(prod(row.shape))):
        return (
            f"of shape {row.shape} has {row.num_bytes:,} bytes of {row.dtype}, packed bits of it"
            f" take {packed_bytes(prod(row.shape)):,}"
        )
    return ""


def _find_tensor_fault(rows: Sequence[StoredRow]) -> str:
    """Return what is wrong with the pieces of a tensor together, or nothing."""
    first = rows[0]
    # The rows that an expert added to the vocabulary begin after those of the base.
    if first.role != "extra_rows" and first.row_start:
        return f"begins with row {first.row_start}"
    for left, right in itertools.pairwise(rows):
        same_kind = (left.dtype, left.shape[1:]) == (right.dtype, right.shape[1:])
        if not same_kind or not (left.shape and right.shape):
            return f"has pieces of {left.dtype} {left.shape} and {right.dtype} {right.shape}"
        if left.row_stop != right.row_start:
            return (
                f"has a piece that ends at row {left.row_stop} and one that begins at row"
                f" {right.row_start}"
            )
    return ""
