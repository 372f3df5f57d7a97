"""Which adapters of which experts a build of kind `adapters` keeps, and under which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.errors import CheckpointError, RecipeError, ShapeMismatch
from mmerge.manifests.format.manifest import AdapterRecord
from mmerge.pipeline.recipes.recipe import Recipe
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.lora_adapter import (
    DEFAULT_ADAPTER,
    AdapterCheckpoint,
    AdapterFolder,
    AdapterPair,
)
from mmerge.workers.checkpoints.sources import TensorSource

_OTHER_NAMES = {"image": ("vision",), "vision": ("image",), "point": ("point_cloud", "pointcloud")}
"""How adapters of a modality are called beside its own name."""


@dataclass(frozen=True)
class ExpertAdapters:
    """What a build keeps of one expert: its factors under the base's names, everything else, and
    how they are used.
    """

    factors: dict[str, TensorSource]
    others: dict[str, TensorSource]
    record: AdapterRecord


def list_adapters(
    recipe: Recipe, base: Checkpoint, experts: Sequence[Checkpoint]
) -> tuple[ExpertAdapters, ...]:
    """Return what is kept of each expert.

    Raises:
        RecipeError: the recipe says something that has no effect on adapters, or an expert is no
            adapter.
        CheckpointError, ShapeMismatch: an adapter is missing, or does not fit the base.
    """
    if recipe.merge != "all" or recipe.carry:
        key = "carry" if recipe.carry else "merge"
        raise RecipeError(
            f"{key}: has no effect with method {recipe.method!r}, which merges no tensor. Leave"
            " it out"
        )
    if recipe.schedules:
        raise RecipeError(
            f"{recipe.method!r} has one number per expert for the whole model; give plain numbers,"
            " not rules per tensor"
        )
    found = []
    for expert, checkpoint in zip(recipe.experts, experts, strict=True):
        if not isinstance(checkpoint, AdapterCheckpoint):
            raise RecipeError(
                f"experts.{expert.name}.path: {expert.uri} holds no LoRA adapter; {recipe.method!r}"
                " composes adapters. Choose another method"
            )
        found.append(
            _describe(
                checkpoint.folder,
                expert.modality,
                expert.parameters,
                base,
                share=1 / len(recipe.experts),
            )
        )
    return tuple(found)


def _describe(
    folder: AdapterFolder, modality: str, parameters: Any, base: Checkpoint, *, share: float
) -> ExpertAdapters:
    default = parameters.default_adapter or (
        folder.adapters[0] if len(folder.adapters) == 1 else DEFAULT_ADAPTER
    )
    own = parameters.adapter or _find_own(folder, modality, default)
    factors: dict[str, TensorSource] = {}
    scales: dict[str, float] = {}
    for adapter in dict.fromkeys((default, own)):
        for pair in folder.pairs_of(adapter):
            name = _place(folder, pair, base)
            factors |= {
                factor_name(name, "A", adapter): pair.a,
                factor_name(name, "B", adapter): pair.b,
            }
            scales[f"{name}:{adapter}"] = pair.scale
    replaced = sorted(name for name in folder.others if name in base.tensors)
    if replaced:
        raise CheckpointError(
            f"{folder.owner}: {replaced[0]}: is saved whole beside the adapters, and a composite of"
            " adapters keeps the base's. Use a method that merges, or leave the tensor out of the"
            " adapter"
        )
    usual = max(sorted(set(scales.values())), key=list(scales.values()).count)
    record = AdapterRecord(
        modality_adapter=own,
        default_adapter=default,
        coefficient=share if parameters.coefficient is None else parameters.coefficient,
        scale=usual,
        other_scales={name: scale for name, scale in sorted(scales.items()) if scale != usual},
    )
    return ExpertAdapters(dict(sorted(factors.items())), folder.others, record)


def _find_own(folder: AdapterFolder, modality: str, default: str) -> str:
    """Return the adapter of a modality's tokens: called as the modality, or the only one beside the
    default, or the default.
    """
    rest = [name for name in folder.adapters if name != default]
    named = [name for name in (modality, *_OTHER_NAMES.get(modality, ())) if name in rest]
    if named or len(rest) == 1:
        return (named or rest)[0]
    if not rest:
        return default
    raise CheckpointError(
        f"{folder.owner}: {folder.uri} has the adapters {', '.join(folder.adapters)}; say with"
        f" 'adapter' which is that of {modality} tokens"
    )


def _place(folder: AdapterFolder, pair: AdapterPair, base: Checkpoint) -> str:
    """Return the name of the base's weight that a pair belongs to."""
    name = base.family.find_adapted_weight(pair.module, base.tensors)
    if name is None:
        raise CheckpointError(
            f"{folder.owner}: {pair.module}: the base has no such Linear. Was the adapter trained"
            " on this base?"
        )
    shape = (pair.b.spec.shape[0], pair.a.spec.shape[1])
    if base.tensors[name].spec.shape != shape:
        raise ShapeMismatch(
            f"{name}: {folder.owner} has an adapter for {shape}, the base has"
            f" {base.tensors[name].spec.shape}. Was it trained on this base?"
        )
    return name


def factor_name(linear: str, factor: str, adapter: str) -> str:
    """Return the name under which a factor of a Linear's adapter is stored."""
    return f"{linear.removesuffix('.weight')}.lora_{factor}.{adapter}.weight"
