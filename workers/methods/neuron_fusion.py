"""Neuron-Fusion, a reconstruction: locate the neurons that tuning changed most, suppress the
others, restore the norm.

Locate-then-Merge (arXiv 2505.16703) is the frame θ = θ₀ + F(Sub(τ)): Sub locates, F merges. Task
arithmetic, TIES, Breadcrumbs, DARE and DELLA are instances of it that locate single entries;
Neuron-Fusion locates neurons. The paper's exact formulas were
not available: results of this method are those of a reconstruction (docs/arithmetic.md), and must
be called so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.manifests.errors import CheckpointError, RecipeError
from mmerge.manifests.format.tensor_names import split_layer
from mmerge.workers.families.registry import projection_of, role_of
from mmerge.workers.methods.interface import (
    Block,
    Granularity,
    Measured,
    MergedBlock,
    Method,
    Parameters,
    Stage,
    TensorVectors,
)
from mmerge.workers.methods.matrix import is_layer_matrix
from mmerge.workers.methods.neurons import (
    Axis,
    NeuronGroup,
    Part,
    Score,
    attention_group,
    feed_forward_group,
    fused_attention,
    keep_threshold,
    measure_part,
    restoring_factor,
    row_groups,
    score_neurons,
    split_group,
)

LOCATE = Stage("locate", "vectors")
Owner = Literal["expert", "base"]
_COLUMN_ROLES = ("attention_output", "down")


class NeuronFusionParameters(Parameters):
    """Numbers and choices of Neuron-Fusion (a reconstruction)."""

    unit: Literal["neuron", "row"] = Field(
        "neuron",
        description=(
            "a neuron is FFN k = gate[k,:], up[k,:], down[:,k] and attention e = v[e,:], o[:,e]; or"
            " every row of every matrix"
        ),
    )
    score: Score = Field(
        "l2",
        description=(
            "how a neuron's change is measured: l2, l1, or relative = l2 over that of the base"
        ),
    )
    keep_ratio: float = Field(
        0.1, gt=0, le=1, description="share of the neurons that is kept, rounded up"
    )
    scope: Literal["layer", "tensor", "model"] = Field(
        "layer",
        description=(
            "where neurons compete: in their layer (FFN and attention separately), in their tensor"
            " alone, or in the whole model"
        ),
    )
    suppress: float = Field(
        0.0, ge=0, le=1, description="β on the change of all other neurons; 0 drops it"
    )
    restore: bool = Field(
        False,
        description=(
            "scale the kept part of each matrix so that the norm of its change is that of tuning"
            " again"
        ),
    )
    query_key: Literal["expert", "base", "neuron"] = Field(
        "expert",
        description=(
            "q and k: the expert's, the base's, or part of the attention neurons of their heads"
        ),
    )
    embeddings: Owner = Field(
        "expert", description="whose embeddings (new tokens live in the expert's)"
    )
    head: Owner = Field("expert", description="whose lm_head")
    norms: Owner = Field("expert", description="whose norms")
    head_dim: int | None = Field(
        None,
        ge=1,
        description="entries per attention head; from the base's configuration if absent",
    )


class NeuronFusion(Method):
    """Reconstruction of Neuron-Fusion: θ = θ₀ + Δ on the neurons that changed most, β·Δ on the
    others.
    """

    name = "neuron_fusion"
    kind = "plain"
    source = (
        "Locate-then-Merge, arXiv 2505.16703 (EMNLP Findings 2025): a reconstruction, not the"
        " authors' code"
    )
    parameters_model = NeuronFusionParameters
    max_experts = 1

    @override
    def granularity(
        self, parameters: NeuronFusionParameters, experts: Sequence[Parameters]
    ) -> Granularity:
        return "row"

    @override
    def stages(
        self, parameters: NeuronFusionParameters, experts: Sequence[Parameters]
    ) -> tuple[Stage, ...]:
        return (LOCATE,)

    @override
    def measure_block(
        self,
        block: Block,
        parameters: NeuronFusionParameters,
        experts: Sequence[Parameters],
        *,
        stage: str,
    ) -> Mapping[str, torch.Tensor]:
        if projection_of(block.name) is None:
            return {}
        axis = _axis(block.name, parameters)
        delta, base = block.task_vectors()[0], block.base
        if len(block.shape) < 2:
            delta, base = delta.reshape(-1, 1), base.reshape(-1, 1)
        measured = measure_part(delta, base, axis=axis)
        if axis == 1 or len(block.shape) < 2:
            return measured
        first = block.start // block.shape[1]
        return {
            quantity: _place(values, first, block.shape[0]) for quantity, values in measured.items()
        }

    @override
    def resolve_vectors(
        self,
        tensors: Sequence[TensorVectors],
        parameters: NeuronFusionParameters,
        experts: Sequence[Parameters],
        *,
        stage: str,
        config: Mapping[str, Any],
    ) -> Mapping[str, Measured]:
        _check_names(tensors)
        measured = {tensor.name: tensor.vectors for tensor in tensors if tensor.vectors}
        groups = _make_groups(
            {tensor.name: tensor.shape for tensor in tensors if tensor.vectors}, parameters, config
        )
        scores = [score_neurons(group, measured, score=parameters.score) for group in groups]
        tensor_parameters = {tensor.name: tensor.parameters for tensor in tensors}
        thresholds = _find_thresholds(groups, scores, tensor_parameters, parameters)
        results: dict[str, Measured] = {}
        for group, group_scores, threshold in zip(groups, scores, thresholds, strict=True):
            is_kept = group_scores >= threshold
            for part in group.parts:
                squares = measured[part.name]["squares"]
                results[part.name] = _describe(part, is_kept, squares, tensor_parameters[part.name])
        return results

    @override
    def merge_block(
        self, block: Block, parameters: NeuronFusionParameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        kept = block.measured.get("kept")
        if kept is None:
            owner = _owner(block.name, block.shape, parameters)
            return MergedBlock(
                (block.base if owner == "base" else block.experts[0]).to(block.dtype)
            )
        axis = _axis(block.name, parameters)
        length = block.shape[axis]
        factors = torch.full((length,), parameters.suppress, dtype=torch.float32)
        factors[torch.tensor(kept, dtype=torch.int64)] = block.measured["factor"][0]
        if axis == 0 and len(block.shape) == 2:
            first = block.start // block.shape[1]
            factors = factors[first : first + len(block.base)].unsqueeze(-1)
        return MergedBlock((block.base + block.task_vectors()[0] * factors).to(block.dtype))


def _check_names(tensors: Sequence[TensorVectors]) -> None:
    """Refuse matrices of unknown names: their neurons cannot be told, and none would be kept."""
    unknown = [
        tensor.name
        for tensor in tensors
        if is_layer_matrix(tensor.name, tensor.shape) and projection_of(tensor.name) is None
    ]
    if unknown:
        raise CheckpointError(
            f"{unknown[0]}: no model family knows this matrix, so its neurons are unknown. Add a"
            " model family (docs/add-a-family.md), or choose another method"
        )


def _find_thresholds(
    groups: Sequence[NeuronGroup],
    scores: Sequence[torch.Tensor],
    tensor_parameters: Mapping[str, Any],
    parameters: NeuronFusionParameters,
) -> list[float]:
    """Return the score from which on the neurons of each group are kept."""
    ratios = [_agreed_ratio(group.parts, tensor_parameters) for group in groups]
    if parameters.scope != "model":
        return [
            keep_threshold(group_scores, keep_ratio=ratio)
            for group_scores, ratio in zip(scores, ratios, strict=True)
        ]
    _agreed_ratio([part for group in groups for part in group.parts], tensor_parameters)
    scores_by_kind: dict[str, list[torch.Tensor]] = {}
    for group, group_scores in zip(groups, scores, strict=True):
        scores_by_kind.setdefault(group.kind, []).append(group_scores)
    thresholds = {
        kind: keep_threshold(torch.cat(kind_scores), keep_ratio=ratios[0])
        for kind, kind_scores in scores_by_kind.items()
    }
    return [thresholds[group.kind] for group in groups]


def _agreed_ratio(parts: Sequence[Part], tensor_parameters: Mapping[str, Any]) -> float:
    ratios = {part.name: float(tensor_parameters[part.name].keep_ratio) for part in parts}
    if len(set(ratios.values())) > 1:
        low = min(ratios, key=lambda name: ratios[name])
        high = max(ratios, key=lambda name: ratios[name])
        raise RecipeError(
            f"keep_ratio: is {ratios[low]} for {low} and {ratios[high]} for {high}, whose neurons"
            " compete. Give one number to tensors that compete, or choose a narrower 'scope'"
        )
    return next(iter(ratios.values()))


def _axis(name: str, parameters: NeuronFusionParameters) -> Axis:
    if parameters.unit != "neuron" or not name.endswith(".weight"):
        return 0
    return 1 if role_of(name) in _COLUMN_ROLES else 0


def _place(values: torch.Tensor, first: int, length: int) -> torch.Tensor:
    placed = torch.zeros(length, dtype=values.dtype)
    placed[first : first + len(values)] = values
    return placed


def _describe(
    part: Part, kept: torch.Tensor, squares: torch.Tensor, parameters: NeuronFusionParameters
) -> Measured:
    """Return which rows or columns of a matrix are kept, and the factor on them."""
    chosen = kept[part.neurons]
    factor = (
        restoring_factor(squares, chosen, suppress=parameters.suppress)
        if parameters.restore
        else 1.0
    )
    return {
        "kept": tuple(float(index) for index in chosen.nonzero().flatten().tolist()),
        "factor": (factor,),
    }


def _make_groups(
    shapes: Mapping[str, Sequence[int]],
    parameters: NeuronFusionParameters,
    config: Mapping[str, Any],
) -> list[NeuronGroup]:
    layers: dict[str, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        split = split_layer(name)
        if split is not None:
            layer = name.removesuffix(f".{split.path}")
            layers.setdefault(layer, {})[name] = shape
    groups = []
    for layer, layer_shapes in layers.items():
        layer_groups = _layer_groups(layer_shapes, parameters, config)
        if not layer_groups:
            raise CheckpointError(
                f"{layer}: has no gate, up and down, and no v and o projections, so it has no"
                " neurons to find. Say 'unit: row'"
            )
        if parameters.scope == "tensor":
            groups += [part for group in layer_groups for part in split_group(group)]
        else:
            groups += layer_groups
    return groups


def _layer_groups(
    shapes: Mapping[str, Sequence[int]],
    parameters: NeuronFusionParameters,
    config: Mapping[str, Any],
) -> list[NeuronGroup]:
    if parameters.unit == "row":
        names = [name for name in sorted(shapes) if len(shapes[name]) == 2]
        if parameters.query_key != "neuron":
            for name in names:
                if role_of(name) == "query_key_value":
                    raise fused_attention(name)
            names = [name for name in names if role_of(name) not in ("query", "key")]
        return [row_groups(shapes, names)] if names else []
    head_dim = (
        parameters.head_dim
        or config.get("head_dim")
        or config["hidden_size"] // config["num_attention_heads"]
    )
    try:
        attention = attention_group(
            shapes, head_dim=int(head_dim), with_query_key=parameters.query_key == "neuron"
        )
    except ValueError as error:
        raise CheckpointError(f"{error}. Give the right 'head_dim'") from error
    return [group for group in (feed_forward_group(shapes), attention) if group is not None]


def _owner(name: str, shape: Sequence[int], parameters: NeuronFusionParameters) -> Owner:
    role = role_of(name)
    if role == "embedding":
        return parameters.embeddings
    if role == "head":
        return parameters.head
    if len(shape) < 2 and "norm" in name:
        return parameters.norms
    if role in ("query", "key"):
        return "base" if parameters.query_key == "base" else "expert"
    return "expert"
