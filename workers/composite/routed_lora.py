"""Linear layers with one LoRA adapter per modality (DAMC)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.workers.checkpoints.lora_weights import LowRank
from mmerge.workers.composite.routing import TEXT, Routing
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan, TensorPart
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import read_adapter, read_default_adapters


class RoutedLoraLinear(nn.Module):
    """y = W x + Σ cᵢ·s·B_dᵢ A_dᵢ x for text tokens, y = W x + s·B_m A_m x for tokens of modality m.

    DAMC (arXiv 2402.12750). The weight of text tokens is resident, so that decoding costs what a
    plain Linear costs. Every token is multiplied by it once; the tokens of a modality are then
    corrected by the low-rank product s·B_m A_m − Σ cᵢ·s·B_dᵢ A_dᵢ.
    """

    def __init__(
        self,
        routing: Routing,
        *,
        weight: torch.Tensor,
        defaults: Sequence[LowRank],
        modalities: Mapping[int, LowRank],
        bias: torch.Tensor | None = None,
    ) -> None:
        """Make a layer.

        Args:
            routing: the modality of each token.
            weight: of text tokens, W + Σ cᵢ·s·B_dᵢ A_dᵢ, [out, in] (`add_adapters`); its dtype is
                the layer's.
            defaults: the adapters added to `weight`, scales multiplied by the coefficients.
            modalities: modality id to adapter; tokens of an id without one use W alone.
            bias: of the base, [out].
        """
        super().__init__()
        self._routing = routing
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = (
            None if bias is None else nn.Parameter(bias.to(weight.dtype), requires_grad=False)
        )
        self._register("default", defaults, weight.dtype)
        for index, adapter in modalities.items():
            self._register(f"modality{index}_", [adapter], weight.dtype)
        self.modalities = tuple(sorted(modalities))

    def _register(self, prefix: str, adapters: Sequence[LowRank], dtype: torch.dtype) -> None:
        """Register adapters as one: A concatenated over ranks, B likewise and scaled."""
        if not adapters:
            return
        a = torch.cat([adapter.a for adapter in adapters])
        b = torch.cat([adapter.b.to(torch.float32) * adapter.scale for adapter in adapters], dim=1)
        self.register_buffer(f"{prefix}a", a.to(dtype), persistent=False)
        self.register_buffer(f"{prefix}b", b.to(dtype), persistent=False)

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [batch, tokens, out] for inputs [batch, tokens, in]."""
        outputs = nn.functional.linear(inputs, self.weight, self.bias)
        groups = self._routing.groups
        if groups is None:
            return outputs
        self._routing.check(inputs)
        flat, rows = inputs.reshape(-1, inputs.shape[-1]), outputs.view(-1, self.out_features)
        for group in groups:
            if group.modality == TEXT:
                continue
            tokens = group.gather(flat)
            if hasattr(self, "defaulta"):
                rows[group.positions] -= self._low_rank_product("default", tokens)
            if group.modality in self.modalities:
                product = self._low_rank_product(f"modality{group.modality}_", tokens)
                rows[group.positions] += product
        return outputs

    def _low_rank_product(self, prefix: str, inputs: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.linear(inputs, self.get_buffer(f"{prefix}a"))
        return nn.functional.linear(hidden, self.get_buffer(f"{prefix}b"))


def route_adapters(
    model: nn.Module,
    reader: BuildReader,
    routing: Routing,
    *,
    expert: str | None,
    plan: TensorParallelPlan,
    rank: int = 0,
) -> None:
    """Replace every Linear that has an adapter in the build by a RoutedLoraLinear.

    Args:
        model: the language model, loaded with the weights of text tokens (of `expert`, if given).
        reader: the build, of kind `adapters`.
        routing: the modality of each token.
        expert: the expert that is loaded alone; all if None.
        plan: how the model is divided. Every rank reads all factors, which are small, and keeps its
            part.
        rank: whose part `model` holds.
    """
    experts = [expert] if expert else reader.expert_names
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        modalities = _read_modality_adapters(reader, name, experts)
        defaults = read_default_adapters(reader, name, experts=experts, is_alone=expert is not None)
        if not modalities and not defaults:
            continue
        if not isinstance(module, nn.Linear):
            raise CheckpointError(
                f"{name}: the build has an adapter for it, but the model has a"
                f" {type(module).__name__} there, not a Linear layer"
            )
        part = plan.part_of(name, (module.out_features, module.in_features), rank=rank)
        routed = RoutedLoraLinear(
            routing,
            weight=module.weight.detach(),
            defaults=[_cut(adapter, part) for adapter in defaults],
            modalities={index: _cut(adapter, part) for index, adapter in modalities.items()},
            bias=module.bias,
        )
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, routed)


def _read_modality_adapters(
    reader: BuildReader, name: str, experts: Sequence[str]
) -> dict[int, LowRank]:
    """Return the modality adapters of a Linear by modality id."""
    adapters = {}
    for expert in experts:
        record = reader.manifest.to_expert(expert).adapters
        if record is None:
            continue
        adapter = read_adapter(reader, name, expert=expert, adapter=record.modality_adapter)
        if adapter is not None:
            adapters[reader.expert_names.index(expert)] = adapter
    return adapters


def _cut(adapter: LowRank, part: TensorPart) -> LowRank:
    """Return the adapter of a part of a weight: rows of B, or columns of A."""
    if part.along == "rows":
        rows = torch.cat([adapter.b[start:stop] for start, stop in part.ranges])
        return LowRank(adapter.a, rows, adapter.scale)
    if part.along == "columns":
        columns = torch.cat([adapter.a[:, start:stop] for start, stop in part.ranges], dim=1)
        return LowRank(columns, adapter.b, adapter.scale)
    return adapter
