"""Consistency of the tensors of a table: pieces of one tensor, θ₀ with τ⋆ and masks, adapters.

Loaders rely on all of it; neither headers nor digests of objects show such a fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from mmerge.manifests.format.manifest import Manifest
from mmerge.manifests.format.object_header import describe_row
from mmerge.manifests.format.table import StoredRow

Key = tuple[str, str, str]
"""Role, expert and name of a tensor."""
Pieces = Mapping[Key, Sequence[StoredRow]]
"""The rows of each tensor, by their first row of the tensor."""
_FACTOR = (".lora_A.", ".lora_B.")


def group_pieces(rows: Sequence[StoredRow]) -> dict[Key, list[StoredRow]]:
    """Return the rows of each tensor, sorted by the first row of the tensor that they hold."""
    pieces: dict[Key, list[StoredRow]] = {}
    for row in rows:
        pieces.setdefault((row.role, row.expert, row.name), []).append(row)
    for tensor_rows in pieces.values():
        tensor_rows.sort(key=lambda row: row.row_start)
    return pieces


def find_tensor_faults(manifest: Manifest, pieces: Pieces) -> Iterator[str]:
    """Yield the contradictions between the rows of one tensor, and between tensors."""
    shapes: dict[Key, tuple[int, ...]] = {}
    for key, rows in pieces.items():
        reason = find_piece_fault(rows)
        if reason:
            yield f"{describe_row(rows[0])} {reason}"
        shapes[key] = ()
        if rows[0].shape:
            shapes[key] = (sum(row.shape[0] for row in rows), *rows[0].shape[1:])
    for key, shape in shapes.items():
        reason = _find_shape_conflict(key, shape, shapes)
        if reason:
            yield f"{describe_row(pieces[key][0])} {reason}"
    names = [expert.name for expert in manifest.experts]
    yield from _find_mask_faults(pieces, names)
    yield from _find_adapter_faults(manifest, shapes)


def find_piece_fault(rows: Sequence[StoredRow]) -> str:
    """Return what is wrong with the pieces of a tensor together, or nothing."""
    first = rows[0]
    # The rows that an expert added to the vocabulary begin after those of the base.
    if first.role != "extra_rows" and first.row_start:
        return f"begins with row {first.row_start}"
    for left, right in pairwise(rows):
        same_kind = (left.dtype, left.shape[1:]) == (right.dtype, right.shape[1:])
        if not same_kind or not (left.shape and right.shape):
            return f"has pieces of {left.dtype} {left.shape} and {right.dtype} {right.shape}"
        if left.row_stop != right.row_start:
            return (
                f"has a piece that ends at row {left.row_stop} and one that begins at row"
                f" {right.row_start}"
            )
    return ""


def _find_shape_conflict(
    key: Key, shape: tuple[int, ...], shapes: Mapping[Key, tuple[int, ...]]
) -> str:
    """Return how the shape of a tensor contradicts that of the base's tensor of its name."""
    role, _, name = key
    base = shapes.get(("base", "", name))
    merged = shapes.get(("merged", "", name))
    if role in ("delta", "mask") and base != shape:
        return f"has shape {shape}, θ₀ of that name {'missing' if base is None else base}"
    if role == "merged" and base is not None:
        return "is merged, and stored as a tensor of the base too"
    if role == "extra_rows":
        shared = merged if base is None else base
        if shared is None or not shape or shared[1:] != shape[1:]:
            return f"has rows of shape {shape[1:]}, the tensor that they extend has shape {shared}"
    return ""


def _find_mask_faults(pieces: Pieces, names: Sequence[str]) -> Iterator[str]:
    for (role, _, name), rows in pieces.items():
        if role == "mask" and ("delta", "", name) not in pieces:
            yield f"{describe_row(rows[0])} has no τ⋆ of that name"
        if role == "extra_rows":
            shared = pieces.get(("base", "", name)) or pieces.get(("merged", "", name), ())
            if shared and rows[0].row_start != shared[-1].row_stop:
                yield (
                    f"{describe_row(rows[0])} begins with row {rows[0].row_start}, the tensor that"
                    f" they extend ends at row {shared[-1].row_stop}"
                )
        if role == "delta":
            yield from _find_masks_of(rows, pieces, names)


def _find_masks_of(
    deltas: Sequence[StoredRow], pieces: Pieces, names: Sequence[str]
) -> Iterator[str]:
    """Compare τ⋆ with the mask of every expert: the same pieces in the same objects."""
    places = [(row.object, row.row_start, row.row_stop) for row in deltas]
    masks = []
    for expert in names:
        rows = pieces.get(("mask", expert, deltas[0].name), ())
        if [(row.object, row.row_start, row.row_stop) for row in rows] != places:
            have = "has none" if not rows else "has it in other pieces"
            yield f"{describe_row(deltas[0])} needs a mask per expert, {expert!r} {have}"
            return
        masks.append(rows)
    for position, delta in enumerate(deltas):
        yield from _find_vote_fault(delta, [rows[position] for rows in masks])


def _find_vote_fault(delta: StoredRow, masks: Sequence[StoredRow]) -> Iterator[str]:
    """Compare the counts of τ⋆ with those of its masks: both count the same bits."""
    statistics = delta.statistics
    if statistics is None or statistics.consensus is None or statistics.overlaps is None:
        return
    counts = [(row.statistics.num_masked or 0) if row.statistics else 0 for row in masks]
    num_votes = sum(votes * count for votes, count in enumerate(statistics.consensus))
    if num_votes != sum(counts):
        yield (
            f"{describe_row(delta)} has a consensus of {num_votes:,} mask bits, its masks count"
            f" {sum(counts):,}"
        )
    for (first, second), overlap in zip(
        combinations(range(len(masks)), 2), statistics.overlaps, strict=False
    ):
        if overlap > min(counts[first], counts[second]):
            yield (
                f"{describe_row(delta)} has an overlap of {overlap:,} entries, the masks of"
                f" {masks[first].expert!r} and {masks[second].expert!r} have {counts[first]:,} and"
                f" {counts[second]:,}"
            )


def _find_adapter_faults(
    manifest: Manifest, shapes: Mapping[Key, tuple[int, ...]]
) -> Iterator[str]:
    """Compare the two factors of every adapter with each other and with their Linear layer."""
    for expert in manifest.experts:
        if expert.adapters is None:
            continue
        adapters = {expert.adapters.modality_adapter, expert.adapters.default_adapter}
        for role, owner, name in shapes:
            if role != "adapter" or owner != expert.name:
                continue
            factor = next((infix for infix in _FACTOR if infix in name), "")
            linear, _, adapter = name.rpartition(factor) if factor else ("", "", "")
            if adapter.removesuffix(".weight") not in adapters:
                yield f"{name} (adapter of {owner}) is of none of {sorted(adapters)}"
                continue
            a, b = (
                shapes.get(("adapter", owner, f"{linear}{infix}{adapter}"), ()) for infix in _FACTOR
            )
            weight = shapes.get(("base", "", f"{linear}.weight"), ())
            if not (len(a) == len(b) == len(weight) == 2) or (b[0], a[1], a[0]) != (
                *weight,
                b[1],
            ):
                yield (
                    f"{name} (adapter of {owner}): factors A {a} and B {b} do not fit"
                    f" {linear}.weight {weight}"
                )
