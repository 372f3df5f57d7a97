"""Adapters of a build put into a loaded language model."""

from __future__ import annotations

import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.lora_weights import LowRank
from mmerge.workers.composite.routed_linear import Routing
from mmerge.workers.composite.routed_lora import RoutedAdapterLinear
from mmerge.workers.composite.tensor_parallel import Division, Part
from mmerge.workers.reconstruction.build_reader import BuildReader


def route_adapters(
    model: nn.Module,
    reader: BuildReader,
    routing: Routing,
    *,
    expert: str | None,
    division: Division,
    rank: int = 0,
) -> None:
    """Put a RoutedAdapterLinear in place of every Linear that an adapter of the build belongs to.

    Args:
        model: the language model, loaded with the weights of text tokens (of `expert`, if one is
            given).
        reader: the build, of kind `adapters`.
        routing: says which token has which modality.
        expert: the one that is loaded alone; all if None.
        division: how the model is divided over ranks; each reads all factors, which are small, and
            keeps its part.
        rank: whose part `model` holds.
    """
    experts = [expert] if expert else reader.expert_names
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        modalities: dict[int, LowRank] = {}
        for each in experts:
            record = reader.manifest.to_expert(each).adapters
            found = (
                None
                if record is None
                else reader.read_adapter(name, each, adapter=record.modality_adapter)
            )
            if found is not None:
                modalities[reader.expert_names.index(each)] = found
        defaults = reader.read_defaults(name, expert)
        if not modalities and not defaults:
            continue
        if not isinstance(module, nn.Linear):
            raise CheckpointError(
                f"{name}: the build has an adapter for it, but the model has a"
                f" {type(module).__name__} there, not a Linear layer"
            )
        part = division.part_of(name, (module.out_features, module.in_features), rank=rank)
        routed = RoutedAdapterLinear(
            routing,
            weight=module.weight.detach(),
            defaults=[_cut(adapter, part) for adapter in defaults],
            modalities={index: _cut(adapter, part) for index, adapter in modalities.items()},
            bias=module.bias,
        )
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, routed)


def _cut(adapter: LowRank, part: Part) -> LowRank:
    """Return the adapter of a part of a weight: its rows of B, or its columns of A."""
    if part.along == "rows":
        rows = torch.cat([adapter.b[start:stop] for start, stop in part.ranges])
        return LowRank(adapter.a, rows, adapter.scale)
    if part.along == "columns":
        columns = torch.cat([adapter.a[:, start:stop] for start, stop in part.ranges], dim=1)
        return LowRank(columns, adapter.b, adapter.scale)
    return adapter
