"""Differences between two builds, and the history of a name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmerge.manifests.errors import ManifestError
from mmerge.manifests.format.manifest import Manifest, manifest_key
from mmerge.manifests.format.references import (
    Reference,
    find_build,
    list_references,
    read_reference,
)
from mmerge.manifests.format.table import StoredRow
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.manifests.stores.base import ReadableStore
from mmerge.pipeline.views.build_summary import (
    BuildSummary,
    read_build,
    select_layer,
    summarise_masks,
)

Change = tuple[str, Any, Any]
"""A name, its value in the first build, its value in the second; None where a build lacks it."""


@dataclass(frozen=True)
class LayerChange:
    """Differences in one layer (None: embeddings, last norm, head)."""

    layer: int | None
    num_tensors: int
    """Tensors whose bytes differ, or that only one build has."""
    densities: dict[str, tuple[float, float]]
    """Mask density of each expert, before and after."""
    norms: tuple[float | None, float | None]
    """‖τ⋆‖₂ of the layer before and after, from the stored norms of its tensors."""


@dataclass(frozen=True)
class Difference:
    """All that differs between two builds."""

    before: Manifest
    after: Manifest
    inputs: tuple[Change, ...]
    parameters: tuple[Change, ...]
    num_shared: int
    shared_bytes: int
    num_new: int
    new_bytes: int
    layers: tuple[LayerChange, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        """Whether both are the same build."""
        return self.before.build == self.after.build


def compare_builds(before_uri: str, after_uri: str) -> Difference:
    """Return what changed from one build to another.

    Raises:
        StoreError, ManifestError: a build cannot be read, or is damaged.
    """
    before = read_build(before_uri, level="structure")
    after = read_build(after_uri, level="structure")
    old_sizes = {entry.key: entry.num_bytes for entry in before.manifest.entries}
    new_sizes = {entry.key: entry.num_bytes for entry in after.manifest.entries}
    shared_keys = old_sizes.keys() & new_sizes.keys()
    new_keys = new_sizes.keys() - old_sizes.keys()
    return Difference(
        before=before.manifest,
        after=after.manifest,
        inputs=_list_changes(_inputs_of(before.manifest), _inputs_of(after.manifest)),
        parameters=_list_changes(_parameters_of(before.manifest), _parameters_of(after.manifest)),
        num_shared=len(shared_keys),
        shared_bytes=sum(new_sizes[key] for key in shared_keys),
        num_new=len(new_keys),
        new_bytes=sum(new_sizes[key] for key in new_keys),
        layers=_compare_layers(before, after),
    )


def _list_changes(before: dict[str, Any], after: dict[str, Any]) -> tuple[Change, ...]:
    names = [*before, *(name for name in after if name not in before)]
    return tuple(
        (name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    )


def _inputs_of(manifest: Manifest) -> dict[str, Any]:
    revisions = {f"expert {expert.name!r}": expert.revision for expert in manifest.experts}
    return {"base": manifest.base.revision} | revisions


def _parameters_of(manifest: Manifest) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "method": manifest.method,
        "merge": manifest.merge,
        "dtype": manifest.dtype,
        "template": manifest.template,
    }
    parameters |= manifest.parameters
    for expert in manifest.experts:
        for name, value in expert.parameters.items():
            parameters[f"{expert.name}.{name}"] = value
    return parameters


def _compare_layers(before: BuildSummary, after: BuildSummary) -> tuple[LayerChange, ...]:
    old_digests, new_digests = _digests_of(before.rows), _digests_of(after.rows)
    num_changed: dict[int | None, int] = defaultdict(int)
    for key in old_digests.keys() | new_digests.keys():
        if old_digests.get(key) != new_digests.get(key):
            num_changed[layer_of(key[0])] += 1
    changes = []
    # Tensors outside layers come first.
    for layer in sorted(num_changed, key=lambda number: -1 if number is None else number):
        old_rows, new_rows = select_layer(before.rows, layer), select_layer(after.rows, layer)
        old_densities = _densities_of(before.manifest, old_rows)
        new_densities = _densities_of(after.manifest, new_rows)
        densities = {
            name: (old_densities[name], new_densities[name])
            for name in old_densities
            if name in new_densities
        }
        norms = (_delta_norm(old_rows), _delta_norm(new_rows))
        changes.append(LayerChange(layer, num_changed[layer], densities, norms))
    return tuple(changes)


def _densities_of(manifest: Manifest, rows: Sequence[StoredRow]) -> dict[str, float]:
    return {mask.expert: mask.density for mask in summarise_masks(manifest, rows)}


def _digests_of(rows: Sequence[StoredRow]) -> dict[tuple[str, str, str, int], str]:
    return {
        (row.name, row.role, row.expert, row.row_start): row.digest
        for row in rows
        if row.role != "base"
    }


def _delta_norm(rows: Sequence[StoredRow]) -> float | None:
    norms = [
        row.statistics.delta_norm
        for row in rows
        if row.role == "delta" and row.statistics and row.statistics.delta_norm is not None
    ]
    return sum(norm**2 for norm in norms) ** 0.5 if norms else None


@dataclass(frozen=True)
class LogEntry:
    """One reference of a name, and whether its build is still in the store."""

    reference: Reference
    is_stored: bool


def read_log(store: ReadableStore, name: str) -> list[LogEntry]:
    """Return the builds of a name, newest first; an empty name stands for the only one.

    Raises:
        ManifestError: the store has no such name, or, where `name` is empty, several or none.
    """
    references = list_references(store)
    if not name:
        find_build(store, "")
        name = next(iter(references))
    if name not in references:
        names = ", ".join(references) or "none"
        raise ManifestError(f"{store.uri}: no composite {name!r}; names there: {names}")
    entries = []
    for number in reversed(references[name]):
        reference = read_reference(store, name, number)
        entries.append(LogEntry(reference, store.exists(manifest_key(reference.build))))
    return entries


def log_to_json(entries: Sequence[LogEntry]) -> list[dict[str, Any]]:
    """Return the builds of a name as JSON."""
    return [
        entry.reference.model_dump(mode="json", exclude={"checksum"})
        | {"is_there": entry.is_stored}
        for entry in entries
    ]


def difference_to_json(difference: Difference) -> dict[str, Any]:
    """Return a difference as JSON."""
    return {
        "builds": [difference.before.build, difference.after.build],
        "inputs": [list(change) for change in difference.inputs],
        "parameters": [list(change) for change in difference.parameters],
        "objects": {
            "shared": difference.num_shared,
            "shared_bytes": difference.shared_bytes,
            "new": difference.num_new,
            "new_bytes": difference.new_bytes,
        },
        "layers": [vars(layer) for layer in difference.layers],
    }
