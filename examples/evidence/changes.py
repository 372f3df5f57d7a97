"""How far each expert went from the base, and what of it MMER's masks keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from evidence.measure import Place, build
from evidence.tables import original, scaled
from mmerge.pipeline import read_build
from mmerge.workers.reader import BuildReader


@dataclass(frozen=True)
class Change:
    """One expert's task vector, and its mask."""

    expert: str
    relative_norm: float
    """Norm of the task vector over that of the base, over all merged tensors."""
    mean_magnitude: float
    mask_density: float
    sign_agreement: float


def find_changes(place: Place, experts: tuple[str, ...], scales: Mapping[str, float]) -> list[Change]:
    """Each expert's change, read from builds of it alone and from MMER's."""
    uri = build({"method": "mmer", "experts": scaled(experts, scales)}, place)
    masks = {mask.expert: mask for mask in read_build(uri).masks}
    base = BuildReader(uri)
    found = []
    for name in experts:
        own = BuildReader(build(original(name), place))
        squares = base_squares = total = count = 0.0
        for tensor in base.names("delta"):
            before = base.read(tensor, "base").to(torch.float32)
            delta = own.read(tensor, "merged").to(torch.float32)[: len(before)] - before
            squares += float(delta.square().sum())
            base_squares += float(before.square().sum())
            total += float(delta.abs().sum())
            count += delta.numel()
        mask = masks[name]
        found.append(Change(name, (squares / base_squares) ** 0.5, total / count, mask.density, mask.sign_agreement))
    return found
