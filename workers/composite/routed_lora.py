"""Linear layers with LoRA adapters per modality: each token is multiplied once, and again only with
its own adapters (DAMC).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mmerge.workers.checkpoints.lora_weights import LowRank
from mmerge.workers.composite.routed_linear import TEXT, Routing


class RoutedAdapterLinear(nn.Module):
    """y = W x + Σ cᵢ·s·B_dᵢ A_dᵢ x for text tokens, y = W x + s·B_m A_m x for tokens of modality m.

    Resident is the weight of text tokens, so that decoding costs what a plain Linear costs. Every
    token is multiplied with it once; tokens of a modality are then corrected by s·B_m A_m − Σ
    cᵢ·s·B_dᵢ A_dᵢ, which has few ranks.
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
            routing: says which token has which modality.
            weight: of text tokens, W + Σ cᵢ·s·B_dᵢ A_dᵢ, [out, in] (`add_adapters`); its dtype is
                the layer's.
            defaults: the adapters in it, their scales multiplied with the coefficients.
            modalities: by modality id the adapter of its tokens; an id without one runs through W
                alone.
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
        """Keep adapters stacked as one: A over ranks, B with the scales in it."""
        if not adapters:
            return
        self.register_buffer(
            f"{prefix}a", torch.cat([adapter.a for adapter in adapters]).to(dtype), persistent=False
        )
        scaled = [adapter.b.to(torch.float32) * adapter.scale for adapter in adapters]
        self.register_buffer(f"{prefix}b", torch.cat(scaled, dim=1).to(dtype), persistent=False)

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
            tokens = group.take(flat)
            if hasattr(self, "defaulta"):
                rows[group.places] -= self._low_rank("default", tokens)
            if group.modality in self.modalities:
                rows[group.places] += self._low_rank(f"modality{group.modality}_", tokens)
        return outputs

    def _low_rank(self, prefix: str, inputs: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(
            nn.functional.linear(inputs, self.get_buffer(f"{prefix}a")),
            self.get_buffer(f"{prefix}b"),
        )
