"""Rows of a build's table held against each other, before memory is taken and bytes are read by
what they say.
"""

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
    """Check that pieces of each tensor make a whole one, and that θ₀, τ⋆ and masks of a name have
    one shape.

    Args:
        pieces: of each tensor, by their first rows.
        uri: the build's.

    Raises:
        ManifestError: they do not; headers and digests of objects do not show that.
    """
    shapes = {}
    for key, rows in pieces.items():
        if reason := next(filter(None, map(_fault_of_row, rows)), "") or _fault_of_tensor(rows):
            raise _contradiction(uri, key, reason)
        shapes[key] = (
            (sum(row.shape[0] for row in rows), *rows[0].shape[1:]) if rows[0].shape else ()
        )
    for (role, expert, name), shape in shapes.items():
        if role in ("delta", "mask") and shapes.get(("base", "", name)) != shape:
            wanted = shapes.get(("base", "", name), "missing")
            raise _contradiction(
                uri, (role, expert, name), f"has shape {shape}, θ₀ of that name {wanted}"
            )


def _contradiction(uri: str, key: Key, reason: str) -> ManifestError:
    role, expert, name = key
    owner = f" of expert {expert!r}" if expert else ""
    return ManifestError(
        f"{uri}: the table contradicts itself: {name} ({role}{owner}) {reason}. The build is"
        " damaged: run the recipe again"
    )


def _fault_of_row(row: StoredRow) -> str:
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


def _fault_of_tensor(rows: Sequence[StoredRow]) -> str:
    first = rows[0]
    if (
        first.role != "extra_rows" and first.row_start
    ):  # rows that were added begin behind the base's
        return f"begins with row {first.row_start}"
    for one, other in itertools.pairwise(rows):
        if (one.dtype, one.shape[1:]) != (other.dtype, other.shape[1:]) or not (
            one.shape and other.shape
        ):
            return f"has pieces of {one.dtype} {one.shape} and {other.dtype} {other.shape}"
        if one.row_stop != other.row_start:
            return (
                f"has a piece that ends at row {one.row_stop} and one that begins at row"
                f" {other.row_start}"
            )
    return ""
