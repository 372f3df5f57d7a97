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

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.families.interface import Role
from mmerge.workers.families.registry import projection_of, role_of

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
    """Return the FFN neurons of a layer, None where the layer has no such FFN.

    Neuron k is gate[k, :], up[k, :] and down[:, k]; without a gate up[k, :] and down[:, k]. In a
    fused matrix of gate and up the rows of up follow those of gate. Biases go with their rows.
    """
    names = _by_role(shapes, ("gate", "up", "gate_up", "down"))
    down = next((name for name in names if _is_weight(name, "down")), None)
    if down is None or len([name for name in names if name.endswith(".weight")]) < 2:
        return None
    count = shapes[down][1]
    order = torch.arange(count)
    parts = []
    for name in names:
        role = role_of(name)
        if role == "down":
            if name == down:
                parts.append(Part(name, 1, order))
        else:
            parts.append(Part(name, 0, order.repeat(2) if role == "gate_up" else order))
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

    Raises:
        ValueError: the matrices do not consist of heads of `head_dim` entries.
        CheckpointError: q, k and v are one matrix, and q and k do not belong to the neurons.
    """
    roles: list[Role] = ["value", "attention_output", "query_key_value"]
    names = _by_role(shapes, [*roles, "query", "key"] if with_query_key else roles)
    output = next((name for name in names if _is_weight(name, "attention_output")), None)
    value = next((name for name in names if _is_weight(name, "value")), None)
    fused = next((name for name in names if _is_weight(name, "query_key_value")), None)
    if output is None or (value is None and fused is None):
        return None
    if fused is not None and not with_query_key:
        raise fused_attention(fused)
    columns = shapes[output][1]
    count = shapes[value][0] if value is not None else (shapes[fused or ""][0] - columns) // 2
    if count % head_dim or columns % count:
        raise ValueError(
            f"{value or fused}: {count} rows and {columns} columns of {output} are no heads of"
            f" {head_dim} entries"
        )
    column = torch.arange(columns)
    per_group = columns // count
    spread = (column // head_dim) // per_group * head_dim + column % head_dim
    order = torch.arange(count)
    parts = []
    for name in names:
        role = role_of(name)
        if role == "attention_output":
            if name == output:
                parts.append(Part(name, 1, spread))
        elif role == "query_key_value":
            parts.append(Part(name, 0, _fused_rows(name, spread, order, head_dim)))
        else:
            parts.append(Part(name, 0, spread if role == "query" else order))
    return NeuronGroup("attn", count, tuple(parts))


def _fused_rows(name: str, query: torch.Tensor, key: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return the neuron of each row of a fused query, key and value, int64 [rows]."""
    projection = projection_of(name)
    if projection is None or not projection.is_interleaved:
        return torch.cat([query, key, key])
    # Rows are stored as [head, 3, head_dim]; every head has its own key and value.
    return key.view(-1, 1, head_dim).expand(-1, 3, -1).reshape(-1)


def fused_attention(name: str) -> CheckpointError:
    """Return the error for q and k that cannot be separated from v in a fused matrix."""
    return CheckpointError(
        f"{name}: holds query, key and value in one matrix, so query and key cannot be left out."
        " Say 'query_key: neuron'"
    )


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


def _by_role(shapes: Mapping[str, Sequence[int]], roles: Sequence[Role]) -> list[str]:
    """Return the weights and biases of some projections: by role, weights before biases."""
    names = sorted(shapes)
    return [
        name
        for role in roles
        for kind in (".weight", ".bias")
        for name in names
        if name.endswith(kind) and role_of(name) == role
    ]


def _is_weight(name: str, role: Role) -> bool:
    return name.endswith(".weight") and role_of(name) == role


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
