"""Neurons of a layer: which rows and columns of its matrices belong together, how they score, which are kept.

Part of the reconstruction of Neuron-Fusion (METHODS.md section 4); see neuron_fusion.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

Score = Literal["l2", "l1", "relative"]
Axis = Literal[0, 1]


@dataclass(frozen=True)
class Part:
    """What a matrix contributes to the neurons of a group: entry i of `neurons` is the neuron of row (or column) i."""

    name: str
    axis: Axis
    """0: rows of [out, in] (or entries of a bias) are the neuron's; 1: columns."""
    neurons: torch.Tensor
    """int64, one per row or column."""


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that compete with each other within a layer."""

    kind: str
    num_neurons: int
    parts: tuple[Part, ...]


def feed_forward_group(shapes: Mapping[str, Sequence[int]]) -> NeuronGroup | None:
    """Return the FFN neurons of a layer: neuron k is gate[k, :], up[k, :] and down[:, k]; None where the layer has no such FFN."""
    found = _by_suffix(shapes, ("gate_proj", "up_proj", "down_proj"))
    if len([name for name in found if name.endswith(".weight")]) < 3:
        return None
    down = next(name for name in found if name.endswith("down_proj.weight"))
    count = shapes[down][1]
    order = torch.arange(count)
    parts = [Part(name, 1 if name == down else 0, order) for name in found if not name.endswith("down_proj.bias")]
    return NeuronGroup("ffn", count, tuple(parts))


def attention_group(shapes: Mapping[str, Sequence[int]], *, head_dim: int, with_query_key: bool) -> NeuronGroup | None:
    """Return the attention neurons of a layer, None where the layer has no attention of that form.

    Neuron j·head_dim + e is row e of key-value head j of v and the columns e of the query heads of its group in o; with
    `with_query_key` also row e of key head j and the rows e of those query heads. Biases go with their rows.

    Args:
        shapes: of the layer's tensors.
        head_dim: entries per head.
        with_query_key: whether q and k belong to the neurons.
    """
    suffixes = ("v_proj", "o_proj", "q_proj", "k_proj") if with_query_key else ("v_proj", "o_proj")
    found = _by_suffix(shapes, suffixes)
    output = next((name for name in found if name.endswith("o_proj.weight")), None)
    value = next((name for name in found if name.endswith("v_proj.weight")), None)
    if output is None or value is None:
        return None
    count, columns = shapes[value][0], shapes[output][1]
    if count % head_dim or columns % count:
        raise ValueError(f"{value}: {count} rows and {columns} columns of {output} are no heads of {head_dim} entries")
    per_group = columns // count
    column = torch.arange(columns)
    spread = (column // head_dim) // per_group * head_dim + column % head_dim
    parts = []
    for name in found:
        projection = name.rsplit(".", 2)[-2]
        if projection == "o_proj":
            if name == output:
                parts.append(Part(name, 1, spread))
        else:
            parts.append(Part(name, 0, spread if projection == "q_proj" else torch.arange(count)))
    return NeuronGroup("attn", count, tuple(parts))


def row_groups(shapes: Mapping[str, Sequence[int]], names: Sequence[str]) -> NeuronGroup:
    """Return one group whose neurons are all the output rows of these matrices, counted through in the order given."""
    parts, count = [], 0
    for name in names:
        rows = shapes[name][0]
        parts.append(Part(name, 0, torch.arange(count, count + rows)))
        count += rows
    return NeuronGroup("row", count, tuple(parts))


def split_group(group: NeuronGroup) -> list[NeuronGroup]:
    """Return a group per part: neurons then compete within one tensor only, and every tensor decides for itself."""
    groups = []
    for part in group.parts:
        first = int(part.neurons.min())
        neurons = part.neurons - first
        groups.append(NeuronGroup(group.kind, int(neurons.max()) + 1, (Part(part.name, part.axis, neurons),)))
    return groups


def _by_suffix(shapes: Mapping[str, Sequence[int]], projections: Sequence[str]) -> list[str]:
    wanted = [f".{projection}.{kind}" for projection in projections for kind in ("weight", "bias")]
    return [name for suffix in wanted for name in sorted(shapes) if f".{name}".endswith(suffix)]


def score_neurons(
    group: NeuronGroup, deltas: Mapping[str, torch.Tensor], bases: Mapping[str, torch.Tensor], *, score: Score
) -> torch.Tensor:
    """Return the score of every neuron of a group, float64 [num_neurons]: ‖Δ‖₂, ‖Δ‖₁ or ‖Δ‖₂/‖θ₀‖₂ over all its parts."""
    total = torch.zeros(group.num_neurons, dtype=torch.float64)
    reference = torch.zeros_like(total)
    for part in group.parts:
        delta = deltas[part.name].to(torch.float64)
        total.index_add_(0, part.neurons, _along(delta.abs() if score == "l1" else delta.square(), part.axis))
        if score == "relative":
            reference.index_add_(0, part.neurons, _along(bases[part.name].to(torch.float64).square(), part.axis))
    if score == "l1":
        return total
    if score == "l2":
        return total.sqrt()
    return torch.where(total > 0, total.sqrt() / reference.sqrt(), torch.zeros_like(total))


def _along(values: torch.Tensor, axis: Axis) -> torch.Tensor:
    if values.ndim == 1:
        return values
    return values.sum(dim=1 - axis)


def keep_threshold(scores: torch.Tensor, *, keep_ratio: float) -> float:
    """Return the score of the ⌈keep_ratio·N⌉-th best of N neurons (at least one); all at or above it are kept.

    So ties stay in, and the choice depends on no order (our choice).
    """
    count = max(1, math.ceil(keep_ratio * len(scores)))
    return float(scores.kthvalue(len(scores) - count + 1).values)


def suppress_neurons(
    part: Part, delta: torch.Tensor, kept: torch.Tensor, *, suppress: float, restore: bool
) -> torch.Tensor:
    """Return Δ on the kept neurons of a part and suppress·Δ elsewhere, float32.

    With `restore` the kept entries are scaled so that the norm of the whole is that of Δ again.

    Args:
        part: which matrix, and whose neurons its rows or columns are.
        delta: Δ of the matrix, float32.
        kept: which neurons of the group are kept, boolean [num_neurons].
        suppress: β, 0 drops.
        restore: whether the norm is restored.
    """
    chosen = kept[part.neurons]
    if delta.ndim == 2:
        chosen = chosen.unsqueeze(1 - part.axis)
    factor = 1.0
    if restore:
        squares = delta.to(torch.float64).square()
        inside = float((squares * chosen).sum())
        outside = float(squares.sum()) - inside
        factor = math.sqrt((inside + (1 - suppress * suppress) * outside) / inside) if inside > 0 else 1.0
    return delta * torch.where(chosen, factor, suppress).to(torch.float32)
