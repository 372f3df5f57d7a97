"""What changed between two builds, and which builds stand behind a name."""

from __future__ import annotations

from collections import defaultdict
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
from mmerge.pipeline.views.show import BuildSummary, read_build, summarise_masks

Change = tuple[str, Any, Any]
"""What, its value in the first build, its value in the second; None where a build has none."""


@dataclass(frozen=True)
class LayerChange:
    """One layer (None: embeddings, last norm, head) in two builds."""

    layer: int | None
    num_tensors: int
    """Tensors whose bytes differ, or that only one build has."""
    densities: dict[str, tuple[float, float]]
    """Mask density per expert."""
    norms: tuple[float | None, float | None]
    """‖τ⋆‖₂ of the layer, from the stored norms of its tensors."""


@dataclass(frozen=True)
class Difference:
    """All that differs between two builds."""

    one: Manifest
    other: Manifest
    inputs: tuple[Change, ...]
    numbers: tuple[Change, ...]
    num_shared: int
    shared_bytes: int
    num_new: int
    new_bytes: int
    layers: tuple[LayerChange, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        """Whether both are the same build."""
        return self.one.build == self.other.build


def compare_builds(uri: str, other_uri: str) -> Difference:
    """Return what changed from the build at `uri` to the one at `other_uri`. Raises StoreError,
    ManifestError.
    """
    one, other = read_build(uri), read_build(other_uri)
    before, after = (
        {entry.key: entry.num_bytes for entry in found.manifest.entries} for found in (one, other)
    )
    shared, new = before.keys() & after.keys(), after.keys() - before.keys()
    return Difference(
        one=one.manifest,
        other=other.manifest,
        inputs=tuple(_changes(_inputs(one.manifest), _inputs(other.manifest))),
        numbers=tuple(_changes(_numbers(one.manifest), _numbers(other.manifest))),
        num_shared=len(shared),
        shared_bytes=sum(after[key] for key in shared),
        num_new=len(new),
        new_bytes=sum(after[key] for key in new),
        layers=tuple(_compare_layers(one, other)),
    )


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    names = [*before, *(name for name in after if name not in before)]
    return [
        (name, before.get(name), after.get(name))
        for name in names
        if before.get(name) != after.get(name)
    ]


def _inputs(manifest: Manifest) -> dict[str, Any]:
    return {"base": manifest.base.revision} | {
        f"expert {expert.name!r}": expert.revision for expert in manifest.experts
    }


def _numbers(manifest: Manifest) -> dict[str, Any]:
    found: dict[str, Any] = {
        "method": manifest.method,
        "merge": manifest.merge,
        "dtype": manifest.dtype,
        "template": manifest.template,
    }
    found |= manifest.parameters
    for expert in manifest.experts:
        found |= {f"{expert.name}.{name}": value for name, value in expert.parameters.items()}
    return found


def _compare_layers(one: BuildSummary, other: BuildSummary) -> list[LayerChange]:
    digests = [_digests(found.rows) for found in (one, other)]
    changed: dict[int | None, int] = defaultdict(int)
    for key in digests[0].keys() | digests[1].keys():
        if digests[0].get(key) != digests[1].get(key):
            changed[layer_of(key[0])] += 1
    layers = []
    for layer in sorted(changed, key=lambda number: (number is not None, number or 0)):
        densities = [
            {mask.expert: mask.density for mask in _masks(found, layer)} for found in (one, other)
        ]
        both = {
            name: (densities[0][name], densities[1][name])
            for name in densities[0]
            if name in densities[1]
        }
        layers.append(
            LayerChange(
                layer, changed[layer], both, (_norm(one.rows, layer), _norm(other.rows, layer))
            )
        )
    return layers


def _masks(found: BuildSummary, layer: int | None) -> Any:
    rows = tuple(row for row in found.rows if layer_of(row.name) == layer)
    return summarise_masks(found.manifest, rows)


def _digests(rows: tuple[StoredRow, ...]) -> dict[tuple[str, str, str, int], str]:
    return {
        (row.name, row.role, row.expert, row.row_start): row.digest
        for row in rows
        if row.role != "base"
    }


def _norm(rows: tuple[StoredRow, ...], layer: int | None) -> float | None:
    norms = [
        row.statistics.delta_norm
        for row in rows
        if row.role == "delta" and row.statistics and layer_of(row.name) == layer
    ]
    found = [norm for norm in norms if norm is not None]
    return sum(norm**2 for norm in found) ** 0.5 if found else None


@dataclass(frozen=True)
class LogLine:
    """One number of a name, newest first, and whether its build is still in the store."""

    reference: Reference
    is_there: bool


def read_log(store: ReadableStore, name: str) -> list[LogLine]:
    """Return the builds behind a name, newest first.

    Raises:
        ManifestError: the store has no such name, or, where `name` is empty, several or none.
    """
    references = list_references(store)
    if not name:
        find_build(store, "")
        name = next(iter(references))
    if name not in references:
        raise ManifestError(
            f"{store.uri}: no composite {name!r}; names there: {', '.join(references) or 'none'}"
        )
    found = [read_reference(store, name, number) for number in reversed(references[name])]
    return [LogLine(reference, store.exists(manifest_key(reference.build))) for reference in found]


def difference_to_json(found: Difference) -> dict[str, Any]:
    """Return a difference as JSON."""
    return {
        "builds": [found.one.build, found.other.build],
        "inputs": [list(change) for change in found.inputs],
        "numbers": [list(change) for change in found.numbers],
        "objects": {
            "shared": found.num_shared,
            "shared_bytes": found.shared_bytes,
            "new": found.num_new,
            "new_bytes": found.new_bytes,
        },
        "layers": [vars(layer) for layer in found.layers],
    }
