"""Adapters of a build put into a loaded language model."""

from __future__ import annotations

import torch
from torch import nn

from mmerge.workers.features import FeatureEncoder
from mmerge.workers.low_rank import LowRank
from mmerge.workers.reader import BuildReader
from mmerge.workers.routed_adapter import RoutedAdapterLinear
from mmerge.workers.routing import Routing


def route_adapters(model: nn.Module, reader: BuildReader, routing: Routing, *, expert: str | None) -> None:
    """Put a RoutedAdapterLinear in place of every Linear that an adapter of the build belongs to.

    Args:
        model: the language model, loaded with the weights of text tokens (of `expert`, if one is given).
        reader: the build, of kind `adapters`.
        routing: says which token has which modality.
        expert: the one that is loaded alone; all if None.
    """
    experts = [expert] if expert else reader.expert_names
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        name = f"{path}.weight"
        modalities: dict[int, LowRank] = {}
        for each in experts:
            record = reader.manifest.to_expert(each).adapters
            found = None if record is None else reader.read_adapter(name, each, adapter=record.modality_adapter)
            if found is not None:
                modalities[reader.expert_names.index(each)] = found
        defaults = reader.read_defaults(name, expert)
        if not modalities and not defaults:
            continue
        routed = RoutedAdapterLinear(routing, weight=module.weight.detach(), defaults=defaults, modalities=modalities, bias=module.bias)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, routed)


def load_features(reader: BuildReader, expert: str, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> FeatureEncoder:
    """Return the connector and learned tokens of an expert whose files hold adapters only."""
    state = {key: reader.read(key, "carried", expert) for key in reader.names("carried", expert)}
    modality = reader.manifest.to_expert(expert).modality
    return FeatureEncoder(expert=expert, modality=modality, state=state, hidden_size=hidden_size, dtype=dtype, device=device)
