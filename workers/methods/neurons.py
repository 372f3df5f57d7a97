"""Neurons of a layer: which rows and columns of its matrices belong together, how they score, which
are kept.

Part of the reconstruction of Neuron-Fusion (docs/arithmetic.md); see neuron_fusion.py.
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
    """What a matrix contributes to the neurons of a group: entry i of `neurons` is the neuron of
    row (or column) i.
    """

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
    """Return the FFN neurons of a layer: neuron k is gate[k, :], up[k, :] and down[:, k]; None
    where the layer has no such FFN.
    """
    found = _by_suffix(shapes, ("gate_proj", "up_proj", "down_proj"))
    if len([name for name in found if name.endswith(".weight")]) < 3:
        return None
    down = next(name for name in found if name.endswith("down_proj.weight"))
    count = shapes[down][1]
    order = torch.arange(count)
    parts = [
        Part(name, 1 if name == down else 0, order)
        for name in found
        if not name.endswith("down_proj.bias")
    ]
    return NeuronGroup("ffn", count, tuple(parts))


def attention_group(
    shapes: Mapping[str, Sequence[int]], *, head_dim: int, with_query_key: bool
) -> NeuronGroup | None:
    """Return the attention neurons of a layer, None where the layer has no attention of that form.

    Neuron j·head_dim + e is row e of key-value head j of v and the columns e of the query heads of
    its group in o; with `with_query_key` also row e of key head j and the rows e of those query
    heads. Biases go with their rows.

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
        raise ValueError(
            f"{value}: {count} rows and {columns} columns of {output} are no heads of {head_dim}"
            " entries"
        )
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
    """Return one group whose neurons are all the output rows of these matrices, counted through in
    the order given.
    """
    parts, count = [], 0
    for name in names:
        rows = shapes[name][0]
        parts.append(Part(name, 0, torch.arange(count, count + rows)))
        count += rows
    return NeuronGroup("row", count, tuple(parts))


def split_group(group: NeuronGroup) -> list[NeuronGroup]:
    """Return a group per part: neurons then compete within one tensor only, and every tensor
    decides for itself.
    """
    groups = []
    for part in group.parts:
        first = int(part.neurons.min())
        neurons = part.neurons - first
        groups.append(
            NeuronGroup(group.kind, int(neurons.max()) + 1, (Part(part.name, part.axis, neurons),))
        )
    return groups


def _by_suffix(shapes: Mapping[str, Sequence[int]], projections: Sequence[str]) -> list[str]:
    wanted = [f".{projection}.{kind}" for projection in projections for kind in ("weight", "bias")]
    return [name for suffix in wanted for name in sorted(shapes) if f".{name}".endswith(suffix)]


def measure_part(delta: torch.Tensor, base: torch.Tensor, *, axis: Axis) -> dict[str, torch.Tensor]:
    """Return sums per row (axis 0) or column (axis 1) of some rows of a matrix: |Δ|, Δ² and θ₀²,
    float64.
    """
    delta, base = delta.to(torch.float64), base.to(torch.float64)
    return {
        "absolute": delta.abs().sum(dim=1 - axis),
        "squares": delta.square().sum(dim=1 - axis),
        "reference": base.square().sum(dim=1 - axis),
    }


def score_neurons(
    group: NeuronGroup, measured: Mapping[str, Mapping[str, torch.Tensor]], *, score: Score
) -> torch.Tensor:
    """Return the score of every neuron of a group, float64 [num_neurons]: ‖Δ‖₂, ‖Δ‖₁ or ‖Δ‖₂/‖θ₀‖₂
    over all its parts.

    Args:
        group: the neurons and their parts.
        measured: by matrix what `measure_part` gives of the whole of it.
        score: which norm.
    """
    if score == "l1":
        return _add_parts(group, measured, "absolute")
    norms = _add_parts(group, measured, "squares").sqrt()
    if score == "l2":
        return norms
    return torch.where(
        norms > 0, norms / _add_parts(group, measured, "reference").sqrt(), torch.zeros_like(norms)
    )


def _add_parts(
    group: NeuronGroup, measured: Mapping[str, Mapping[str, torch.Tensor]], quantity: str
) -> torch.Tensor:
    total = torch.zeros(group.num_neurons, dtype=torch.float64)
    for part in group.parts:
        total.index_add_(0, part.neurons, measured[part.name][quantity])
    return total


def keep_threshold(scores: torch.Tensor, *, keep_ratio: float) -> float:
    """Return the score of the ⌈keep_ratio·N⌉-th best of N neurons (at least one); all at or above
    it are kept.

    So ties stay in, and the choice depends on no order (our choice).
    """
    count = max(1, math.ceil(keep_ratio * len(scores)))
    return float(scores.kthvalue(len(scores) - count + 1).values)


def restoring_factor(squares: torch.Tensor, kept: torch.Tensor, *, suppress: float) -> float:
    """Return the factor on the kept rows (or columns) of a matrix with which ‖Δ′‖ = ‖Δ‖; 1 where
    nothing is kept.

    Args:
        squares: Σ Δ² per row (or column), float64.
        kept: which of them are kept, boolean.
        suppress: β, the factor on all others, which stays as it is.
    """
    inside = float(squares[kept].sum())
    outside = float(squares[~kept].sum())
    return math.sqrt((inside + (1 - suppress * suppress) * outside) / inside) if inside > 0 else 1.0
