"""Adapters that a build of kind `adapters` stores: which of each expert, under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.errors import CheckpointError, RecipeError, ShapeMismatch
from mmerge.manifests.format.manifest import AdapterRecord
from mmerge.pipeline.recipes.recipe import Recipe
from mmerge.workers.adapters.checkpoint import AdapterCheckpoint
from mmerge.workers.adapters.folder import AdapterFolder, AdapterPair
from mmerge.workers.adapters.placement import ModulePlacer
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.expert_only import find_expert_only
from mmerge.workers.checkpoints.sources import TensorSource

_OTHER_NAMES = {"image": ("vision",), "vision": ("image",), "point": ("point_cloud", "pointcloud")}
"""Other usual names of the adapter of a modality."""


@dataclass(frozen=True)
class ExpertAdapters:
    """What a build stores of one expert: its factors, its other tensors, their use."""

    factors: dict[str, TensorSource]
    others: dict[str, TensorSource]
    record: AdapterRecord


def list_adapters(
    recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint]
) -> tuple[ExpertAdapters, ...]:
    """Return what a build stores of each expert, in recipe order.

    Raises:
        RecipeError: a key of the recipe has no effect on adapters, or an expert is no adapter.
        CheckpointError, ShapeMismatch: an adapter is missing or does not fit the base.
    """
    if recipe.merge != "all" or recipe.carry:
        key = "carry" if recipe.carry else "merge"
        raise RecipeError(
            f"{key}: has no effect with method {recipe.method!r}, which merges no tensor. Leave"
            " it out"
        )
    if recipe.schedules:
        raise RecipeError(
            f"{recipe.method!r} has one coefficient per expert for the whole model; give plain"
            " numbers, not rules per tensor"
        )
    adapters = []
    for expert, checkpoint in zip(recipe.experts, experts, strict=True):
        if not isinstance(checkpoint, AdapterCheckpoint):
            raise RecipeError(
                f"experts.{expert.name}.path: {expert.uri} holds no LoRA adapter; {recipe.method!r}"
                " composes adapters. Choose another method"
            )
        adapters.append(
            _describe(
                checkpoint.folder,
                expert.modality,
                expert.parameters,
                base,
                share=1 / len(recipe.experts),
            )
        )
    return tuple(adapters)


def _describe(
    folder: AdapterFolder, modality: str, parameters: Any, base: Checkpoint, *, share: float
) -> ExpertAdapters:
    default = parameters.default_adapter or folder.default_adapter
    modality_adapter = parameters.adapter or _find_modality_adapter(folder, modality, default)
    placer = ModulePlacer(base)
    factors: dict[str, TensorSource] = {}
    scales: dict[str, float] = {}
    for adapter in dict.fromkeys((default, modality_adapter)):
        for pair in folder.plain_pairs_of(adapter, use="damc"):
            name = _place(folder, pair, base=base, placer=placer)
            factors |= {
                factor_name(name, "A", adapter): pair.a,
                factor_name(name, "B", adapter): pair.b,
            }
            scales[f"{name}:{adapter}"] = folder.scale_of(pair)
    others = placer.place_others(folder)
    replaced = sorted(name for name in others if name in base.tensors)
    prefix = base.family.find_prefixes(base.tensors)[0]
    replaced += find_expert_only(
        others,
        base_names=base.tensors,
        renames=((prefix, prefix), (base.family.head, base.family.head)),
    )
    if replaced:
        raise CheckpointError(
            f"{folder.owner}: {replaced[0]}: is saved whole beside the adapters, but a composite of"
            " adapters uses the base's. Use a method that merges, or remove the tensor from the"
            " adapter"
        )
    usual = max(sorted(set(scales.values())), key=list(scales.values()).count)
    record = AdapterRecord(
        modality_adapter=modality_adapter,
        default_adapter=default,
        coefficient=share if parameters.coefficient is None else parameters.coefficient,
        scale=usual,
        other_scales={name: scale for name, scale in sorted(scales.items()) if scale != usual},
    )
    return ExpertAdapters(dict(sorted(factors.items())), others, record)


def _find_modality_adapter(folder: AdapterFolder, modality: str, default: str) -> str:
    """Return the adapter of a modality's tokens.

    It has the name of the modality, or is the only one beside the default, or the default itself.
    """
    names = [name for name in folder.adapters if name != default]
    matching = [name for name in (modality, *_OTHER_NAMES.get(modality, ())) if name in names]
    if matching or len(names) == 1:
        return (matching or names)[0]
    if not names:
        return default
    raise CheckpointError(
        f"{folder.owner}: {folder.uri} has the adapters {', '.join(folder.adapters)}; name"
        f" the one of {modality} tokens with 'adapter'"
    )


def _place(
    folder: AdapterFolder, pair: AdapterPair, *, base: Checkpoint, placer: ModulePlacer
) -> str:
    """Return the name of the base's weight that a pair adapts."""
    name = placer.find_weight(pair.module)
    if name is None:
        raise CheckpointError(
            f"{folder.owner}: {pair.module}: the base has no such Linear layer. Was the adapter"
            " trained on this base?"
        )
    shape = (pair.b.spec.shape[0], pair.a.spec.shape[1])
    if base.tensors[name].spec.shape != shape:
        raise ShapeMismatch(
            f"{name}: {folder.owner} has an adapter for {shape}, the base has"
            f" {base.tensors[name].spec.shape}. Was it trained on this base?"
        )
    return name


def factor_name(linear: str, factor: str, adapter: str) -> str:
    """Return the stored name of a factor: `….lora_A.ADAPTER.weight`."""
    return f"{linear.removesuffix('.weight')}.lora_{factor}.{adapter}.weight"
