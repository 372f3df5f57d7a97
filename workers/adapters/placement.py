"""Which tensor of the base a module of an adapter is."""

from __future__ import annotations

from mmerge.workers.adapters.folder import AdapterFolder
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.sources import TensorSource


def find_weight(module: str, base: Checkpoint) -> str | None:
    """Return the base's weight that an adapter's module is, None where the base has none."""
    return base.family.find_adapted_weight(module, base.tensors, prefix=base.language_prefix)


def place_others(folder: AdapterFolder, base: Checkpoint) -> dict[str, TensorSource]:
    """Return what an adapter saved whole, under the base's names where the base has the module."""
    placed = {}
    for name, source in folder.others.items():
        module, _, last = name.rpartition(".")
        weight = find_weight(module, base) if module else None
        placed[f"{weight.removesuffix('weight')}{last}" if weight else name] = source
    return placed
