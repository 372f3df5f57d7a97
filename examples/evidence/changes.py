"""Task vectors of the experts, and what masks with and without each test keep of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from evidence.ablations import MaskRule, without_congruence, without_significance
from evidence.measure import Place, build
from evidence.tables import original, scaled
from mmerge.pipeline import read_build
from mmerge.workers.methods.combine_rules import disjoint_merge, elect_sign
from mmerge.workers.methods.locate_rules import trim
from mmerge.workers.methods.mask_rules import decouple
from mmerge.workers.reconstruction.build_reader import BuildReader

DENSITY = 0.8
RULES: dict[str, MaskRule] = {
    "MMER": lambda trimmed, merged, scale: decouple(trimmed, merged, mask_scale=scale),
    "without directional congruence": without_congruence,
    "without dominant significance": without_significance,
}


@dataclass(frozen=True)
class Kept:
    """What one expert's mask makes of the merged task vector."""

    density: float
    opposite: float
    """Share of the mask's entries at which the expert's sign is not that of τ⋆."""
    distance: float
    """‖m∘τ⋆ − τ‖ / ‖τ‖, over all entries of the expert's task vector."""


@dataclass(frozen=True)
class Change:
    """One expert's task vector, and its mask."""

    expert: str
    relative_norm: float
    """Norm of the task vector over that of the base, over all merged tensors."""
    mean_magnitude: float
    mask_density: float
    sign_agreement: float
    kept: dict[str, Kept] = field(default_factory=dict)
    """By rule of the masks."""


@dataclass(frozen=True)
class Changes:
    """All experts' changes, and what text tokens keep of the merged task vector."""

    experts: tuple[Change, ...] = ()
    text_norms: dict[str, float] = field(default_factory=dict)
    """‖m̄∘τ⋆‖ / ‖τ⋆‖ by rule of the masks."""


def find_changes(place: Place, experts: tuple[str, ...], scales: Mapping[str, float]) -> Changes:
    """Each expert's change, read from builds of it alone and from MMER's."""
    uri = build({"method": "mmer", "experts": scaled(experts, scales)}, place)
    manifest = {mask.expert: mask for mask in read_build(uri).masks}
    base = BuildReader(uri)
    tensors = base.names("delta")
    before = [base.read(name, "base").to(torch.float32) for name in tensors]
    merged = _flat(base.read(name, "delta") for name in tensors)
    deltas = []
    for name in experts:
        reader = BuildReader(build(original(name), place))
        deltas.append(
            _flat(
                reader.read(t, "merged").to(torch.float32)[: len(b)] - b
                for t, b in zip(tensors, before, strict=True)
            )
        )
    kept, text_norms = find_kept(deltas, merged, [scales.get(name, 0.75) for name in experts])
    base_norm = float(_flat(before).norm())
    return Changes(
        tuple(
            Change(
                name,
                float(delta.norm()) / base_norm,
                float(delta.abs().mean()),
                manifest[name].density,
                manifest[name].sign_agreement,
                own_kept,
            )
            for name, delta, own_kept in zip(experts, deltas, kept, strict=True)
        ),
        text_norms,
    )


def find_kept(
    deltas: Sequence[torch.Tensor], merged: torch.Tensor, scales: Sequence[float]
) -> tuple[list[dict[str, Kept]], dict[str, float]]:
    """Return what masks by each rule make of τ⋆, and the share of its norm in text tokens.

    `deltas`: task vectors, float32 [entries]; `merged`: τ⋆ of them; `scales`: mask scales.
    """
    trimmed = _trim(deltas)
    kept: list[dict[str, Kept]] = [{} for _ in deltas]
    text_norms = {}
    for rule, make in RULES.items():
        mean_mask = torch.zeros_like(merged)
        for index, (delta, trimmed_delta, scale) in enumerate(
            zip(deltas, trimmed, scales, strict=True)
        ):
            mask = make(trimmed_delta, merged, scale)
            mean_mask += mask / len(deltas)
            opposite = (mask & (trimmed_delta.sign() != merged.sign())).sum() / mask.sum()
            distance = (mask * merged - delta).norm() / delta.norm()
            kept[index][rule] = Kept(float(mask.float().mean()), float(opposite), float(distance))
        text_norms[rule] = float((mean_mask * merged).norm() / merged.norm())
    return kept, text_norms


def simulate(
    magnitudes: Mapping[str, float], *, entries: int = 1_000_000, scale: float = 0.75
) -> list[dict[str, Kept]]:
    """Return what masks keep of independent normal task vectors.

    They have the given mean magnitudes and are merged as MMER merges.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(magnitudes), entries, generator=generator)
    deltas = [
        row * (value / float(row.abs().mean()))
        for row, value in zip(noise, magnitudes.values(), strict=True)
    ]
    trimmed = _trim(deltas)
    merged = disjoint_merge(trimmed, elect_sign(trimmed), reduction="sum")
    return find_kept(deltas, merged, [scale] * len(deltas))[0]


def _trim(deltas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    trimmed = []
    for delta in deltas:
        rank = delta.numel() - int(DENSITY * delta.numel())
        trimmed.append(trim(delta, threshold=float(delta.abs().kthvalue(max(rank, 1)).values)))
    return trimmed


def _flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.to(torch.float32).reshape(-1) for tensor in tensors])
