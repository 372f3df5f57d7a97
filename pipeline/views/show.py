"""What `mmerge show` tells of a store or a build."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.format.manifest import Manifest, read_manifest
from mmerge.manifests.format.references import (
    Reference,
    list_references,
    open_build,
    read_reference,
)
from mmerge.manifests.format.table import StoredRow, read_table
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.manifests.stores.base import ReadableStore


@dataclass(frozen=True)
class MaskSummary:
    """Shares of entries over one layer (or the whole model) for one expert."""

    expert: str
    density: float
    """Share of entries that the mask keeps."""
    sign_agreement: float
    """Share of the kept (trimmed) entries whose sign is the elected one."""


@dataclass(frozen=True)
class ConsensusSummary:
    """Share of entries wanted by exactly 0, 1, …, n experts, and by both of each pair."""

    wanted: tuple[float, ...]
    overlaps: dict[str, float]


@dataclass(frozen=True)
class BuildSummary:
    """A build with its statistics."""

    manifest: Manifest
    rows: tuple[StoredRow, ...]
    masks: tuple[MaskSummary, ...]
    consensus: ConsensusSummary | None
    num_bytes: int


def read_build(uri: str) -> BuildSummary:
    """Return the manifest of the build at `uri` with its statistics. Raises StoreError,
    ManifestError.
    """
    store, build = open_build(uri)
    manifest = read_manifest(store, build)
    rows = tuple(read_table(store, manifest.table))
    return BuildSummary(
        manifest=manifest,
        rows=rows,
        masks=summarise_masks(manifest, rows),
        consensus=_summarise_consensus(manifest, rows),
        num_bytes=sum(entry.num_bytes for entry in manifest.entries),
    )


def read_references(store: ReadableStore) -> list[Reference]:
    """Return the latest reference of every name in a store."""
    return [
        read_reference(store, name, numbers[-1]) for name, numbers in list_references(store).items()
    ]


def summarise_masks(
    manifest: Manifest, rows: tuple[StoredRow, ...], *, layer: int | None = None
) -> tuple[MaskSummary, ...]:
    """Return the mask statistics per expert, of one layer if given."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows:
        found = row.statistics
        if (
            row.role != "mask"
            or found is None
            or (layer is not None and layer_of(row.name) != layer)
        ):
            continue
        pairs = (found.num_entries, found.num_masked, found.num_kept, found.num_agreeing)
        counts[row.expert] = [
            total + (part or 0) for total, part in zip(counts[row.expert], pairs, strict=True)
        ]
    return tuple(
        MaskSummary(name, masked / max(entries, 1), agreeing / max(kept, 1))
        for name in (expert.name for expert in manifest.experts)
        if name in counts
        for entries, masked, kept, agreeing in [counts[name]]
    )


def _summarise_consensus(
    manifest: Manifest, rows: tuple[StoredRow, ...]
) -> ConsensusSummary | None:
    found = [row.statistics for row in rows if row.role == "delta" and row.statistics is not None]
    if not found:
        return None
    entries = sum(statistics.num_entries for statistics in found)
    wanted = [
        sum(column) / entries
        for column in zip(*(statistics.consensus or () for statistics in found), strict=True)
    ]
    names = [expert.name for expert in manifest.experts]
    pairs = [f"{one}+{other}" for index, one in enumerate(names) for other in names[index + 1 :]]
    shared = [
        sum(column) / entries
        for column in zip(*(statistics.overlaps or () for statistics in found), strict=True)
    ]
    return ConsensusSummary(tuple(wanted), dict(zip(pairs, shared, strict=True)))


def to_json(summary: BuildSummary) -> dict[str, Any]:
    """Return what `mmerge show --json` prints: the manifest, and the statistics over the whole
    model.
    """
    manifest = summary.manifest.model_dump(mode="json", exclude_none=True)
    statistics: dict[str, Any] = {
        "num_bytes": summary.num_bytes,
        "masks": {
            mask.expert: {"density": mask.density, "sign_agreement": mask.sign_agreement}
            for mask in summary.masks
        },
    }
    if summary.consensus:
        statistics["consensus"] = {
            str(count): share for count, share in enumerate(summary.consensus.wanted)
        }
        statistics["overlaps"] = summary.consensus.overlaps
    return {"manifest": manifest, "statistics": statistics}
