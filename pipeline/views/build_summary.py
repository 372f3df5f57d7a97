"""A build with its statistics: what `mmerge show` prints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from mmerge.manifests.format.manifest import Manifest
from mmerge.manifests.format.references import (
    Reference,
    list_references,
    read_reference,
)
from mmerge.manifests.format.table import StoredRow
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.manifests.maintenance.check_build import Level, open_checked_build
from mmerge.manifests.stores.base import ReadableStore


@dataclass(frozen=True)
class MaskSummary:
    """Mask statistics of one expert over one layer, or the whole model."""

    expert: str
    density: float
    """Share of the weights that the mask keeps."""
    sign_agreement: float
    """Share of the trimmed weights whose sign is the elected one."""


@dataclass(frozen=True)
class ConsensusSummary:
    """How many experts' masks keep the same weights."""

    shares: tuple[float, ...]
    """Share of the weights that exactly 0, 1, …, n masks keep."""
    overlaps: dict[str, float]
    """Share of the weights that both masks of a pair of experts keep."""


@dataclass(frozen=True)
class BuildSummary:
    """A build with its statistics."""

    manifest: Manifest
    rows: tuple[StoredRow, ...]
    masks: tuple[MaskSummary, ...]
    consensus: ConsensusSummary | None
    num_bytes: int


def read_build(uri: str, *, level: Level = "records") -> BuildSummary:
    """Return the manifest and the statistics of the build at `uri`, checked to this level.

    Raises:
        StoreError, ManifestError: it cannot be read, or is damaged.
    """
    checked = open_checked_build(uri, level=level)
    manifest, rows = checked.manifest, checked.rows
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


def select_layer(rows: Iterable[StoredRow], layer: int | None) -> tuple[StoredRow, ...]:
    """Return the rows of one layer; None selects embeddings, last norm and head."""
    return tuple(row for row in rows if layer_of(row.name) == layer)


def summarise_masks(manifest: Manifest, rows: Sequence[StoredRow]) -> tuple[MaskSummary, ...]:
    """Return the mask statistics of every expert over these rows."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows:
        statistics = row.statistics
        if row.role != "mask" or statistics is None:
            continue
        row_counts = (
            statistics.num_entries,
            statistics.num_masked,
            statistics.num_kept,
            statistics.num_agreeing,
        )
        for index, count in enumerate(row_counts):
            counts[row.expert][index] += count or 0
    summaries = []
    for expert in manifest.experts:
        if expert.name in counts:
            num_weights, num_masked, num_kept, num_agreeing = counts[expert.name]
            density = num_masked / max(num_weights, 1)
            summaries.append(MaskSummary(expert.name, density, num_agreeing / max(num_kept, 1)))
    return tuple(summaries)


def _summarise_consensus(manifest: Manifest, rows: Sequence[StoredRow]) -> ConsensusSummary | None:
    statistics = [row.statistics for row in rows if row.role == "delta" and row.statistics]
    if not statistics:
        return None
    num_weights = sum(item.num_entries for item in statistics)
    shares = _sum_columns([item.consensus or () for item in statistics], divisor=num_weights)
    overlaps = _sum_columns([item.overlaps or () for item in statistics], divisor=num_weights)
    names = [expert.name for expert in manifest.experts]
    pairs = [f"{first}+{second}" for first, second in combinations(names, 2)]
    return ConsensusSummary(shares, dict(zip(pairs, overlaps, strict=True)))


def _sum_columns(rows: Sequence[Sequence[int]], *, divisor: int) -> tuple[float, ...]:
    return tuple(sum(column) / divisor for column in zip(*rows, strict=True))


def to_json(summary: BuildSummary) -> dict[str, Any]:
    """Return the manifest, and the statistics over the whole model, as JSON."""
    statistics: dict[str, Any] = {
        "num_bytes": summary.num_bytes,
        "masks": {
            mask.expert: {"density": mask.density, "sign_agreement": mask.sign_agreement}
            for mask in summary.masks
        },
    }
    if summary.consensus:
        statistics["consensus"] = {
            str(count): share for count, share in enumerate(summary.consensus.shares)
        }
        statistics["overlaps"] = summary.consensus.overlaps
    manifest = summary.manifest.model_dump(mode="json", exclude_none=True)
    return {"manifest": manifest, "statistics": statistics}
