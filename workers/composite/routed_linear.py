"""Linear layers that multiply each token by the weights of its own modality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mmerge.workers.composite.routing import TEXT, Routing
from mmerge.workers.composite.token_groups import TokenGroup, is_tracked
from mmerge.workers.reconstruction.masked_weights import add_masked_delta

BLOCK_ENTRIES = 1 << 21
"""Entries of a modality's weight reconstructed per block, at least.

A block is multiplied while it is still in the last-level cache.
"""
BLOCK_ROWS = 1024
"""Rows of a block, at least: products of fewer are slow, by half on CPUs with matrix units."""
ROW_STEP = 64
"""Blocks are multiples of this many rows: a product pays for the next multiple anyway."""

Policy = Literal["packed", "resident"]
"""`packed` keeps τ⋆ and packed masks, and reconstructs a modality's weights per layer at prefill.

`resident` keeps the weights of every modality.
"""


class RoutedLinear(nn.Module):
    """A Linear with the weights θ₀ + mᵢ∘τ⋆ for tokens of modality i and θ₀ + m̄∘τ⋆ for text.

    MMER (arXiv 2505.17110), Expansion. The text weights are resident, so that decoding costs what a
    plain Linear costs. With the policy `packed` a modality's weights are θ_text + (mᵢ − m̄)∘τ⋆,
    reconstructed block by block when a prefill has tokens of that modality; θ₀ itself is not kept.
    With `resident` they are kept, computed from θ₀. In bfloat16 the two differ by the rounding of
    θ_text. Tokens are gathered by modality, so each is multiplied once.
    """

    def __init__(
        self, routing: Routing, weights: RoutedWeights, *, bias: RoutedBias | None = None
    ) -> None:
        """Make a layer with these weights, on their device."""
        super().__init__()
        self._routing = routing
        self.num_experts = weights.num_experts
        self._factors, self._divisor = weights.factors, weights.divisor
        self.weight = nn.Parameter(weights.text, requires_grad=False)
        self.delta: torch.Tensor | None
        self.masks: torch.Tensor | None
        self.modalities: torch.Tensor | None
        self.register_buffer("delta", weights.delta, persistent=False)
        self.register_buffer("masks", weights.masks, persistent=False)
        self.register_buffer("modalities", weights.modalities, persistent=False)
        self.bias = bias

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    def modality_weight(
        self, index: int, *, rows: slice = slice(None), out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return rows of the weights of expert `index`, [rows, in], in the layer's dtype.

        Weights that are not resident are reconstructed, in `out` if given.
        """
        if self.num_experts == 1:
            return self.weight[rows]  # m̄ of a single expert is its own mask
        if self.modalities is not None:
            return self.modalities[index, rows]
        return add_masked_delta(
            self.weight.detach()[rows],
            self.get_buffer("delta")[rows],
            self.get_buffer("masks")[:, rows],
            factors=self._factors[index],
            divisor=self._divisor,
            out=out,
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [batch, tokens, out] for inputs [batch, tokens, in]."""
        groups = self._routing.groups
        if groups is None:
            bias = None if self.bias is None else self.bias.text
            return nn.functional.linear(inputs, self.weight, bias)
        self._routing.check(inputs)
        flat = inputs.reshape(-1, inputs.shape[-1])
        outputs = flat.new_empty(flat.shape[0], self.out_features)
        gathered = [(group, group.gather(flat)) for group in groups]
        for group, tokens in gathered:
            if group.modality == TEXT:
                bias = self._bias_of(TEXT)
                group.linear_into(tokens, self.weight, bias=bias, outputs=outputs)
        media = [(group, tokens) for group, tokens in gathered if group.modality != TEXT]
        self._add_modalities(media, outputs)
        return outputs.reshape(*inputs.shape[:-1], self.out_features)

    def _add_modalities(
        self, gathered: Sequence[tuple[TokenGroup, torch.Tensor]], outputs: torch.Tensor
    ) -> None:
        """Write the products of all modalities but text to `outputs`, [all tokens, out]."""
        step = self.out_features
        if self.modalities is None:
            step = block_rows(self.out_features, self.in_features)
        # Blocks in the outer loop: all modalities read the same rows of θ_text and τ⋆, from the
        # second on out of a cache.
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            memory = None
            # Autograd keeps every weight until the backward pass, so they cannot share memory.
            if self.delta is not None and not is_tracked(*(tokens for _, tokens in gathered)):
                shape = (rows.stop - rows.start, self.in_features)
                memory = self._routing.scratch(shape, like=self.weight)
            for group, tokens in gathered:
                weight = self.modality_weight(group.modality, rows=rows, out=memory)
                bias = self._bias_of(group.modality, rows)
                group.linear_into(tokens, weight, bias=bias, outputs=outputs, rows=rows)

    def _bias_of(self, modality: int, rows: slice = slice(None)) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.of(modality)[rows]


class RoutedBias(nn.Module):
    """A bias per modality, and the one of text tokens."""

    def __init__(self, text: torch.Tensor, experts: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.text: torch.Tensor
        self.register_buffer("text", text, persistent=False)
        for index, bias in enumerate(experts):
            self.register_buffer(f"expert{index}", bias, persistent=False)

    def of(self, index: int) -> torch.Tensor:
        """Return the bias of a modality id."""
        return self.text if index == TEXT else self.get_buffer(f"expert{index}")


@dataclass(frozen=True)
class RoutedWeights:
    """Weights of a RoutedLinear: θ_text, and either τ⋆ with packed masks, or every modality's.

    `text` is [out, in] in the layer's dtype, `delta` [out, in] in any, `masks` uint8 [experts, out,
    ⌈in/8⌉] packed by rows, `modalities` [experts, out, in]. θᵢ = θ_text + (Σ factorsᵢⱼ·mⱼ /
    divisor)∘τ⋆.
    """

    text: torch.Tensor
    delta: torch.Tensor | None
    masks: torch.Tensor | None
    modalities: torch.Tensor | None
    factors: list[list[float]]
    divisor: float

    @property
    def num_experts(self) -> int:
        """Experts with a mask."""
        return len(self.factors)

    @classmethod
    def from_masks(
        cls,
        base: torch.Tensor,
        delta: torch.Tensor,
        masks: torch.Tensor,
        *,
        dtype: torch.dtype,
        policy: Policy = "packed",
        rescalers: Sequence[float] = (),
    ) -> RoutedWeights:
        """Return the weights of a layer from θ₀, τ⋆ and masks.

        Args:
            base, delta: [out, in].
            masks: packed by rows, uint8 [experts, out, ⌈in/8⌉].
            dtype: of the layer.
            policy: see `Policy`.
            rescalers: factors of the masks (EMR), all 1 if absent.
        """
        count = len(masks)
        scales = list(rescalers) or [1.0] * count
        text = add_masked_delta(
            base, delta, masks, factors=scales, divisor=float(count), dtype=dtype
        )
        factors, divisor = cls.make_factors(scales)
        if policy == "packed":
            if count == 1:  # θ_text is the expert's weight, nothing else is needed
                return cls(text, None, None, None, factors, divisor)
            return cls(text, delta, masks, None, factors, divisor)
        weights = []
        for index, scale in enumerate(scales):
            expert_factors = [0.0] * count
            expert_factors[index] = scale
            weights.append(
                add_masked_delta(
                    base, delta, masks, factors=expert_factors, divisor=1.0, dtype=dtype
                )
            )
        return cls(text, None, None, torch.stack(weights), factors, divisor)

    @staticmethod
    def make_factors(rescalers: Sequence[float]) -> tuple[list[list[float]], float]:
        """Return the factors of each expert on all masks, and their divisor.

        With rescalers rⱼ: mᵢ − m̄ = (n·rᵢmᵢ − Σ rⱼmⱼ) / n.
        """
        count = len(rescalers)
        factors = []
        for index in range(count):
            row = [-scale for scale in rescalers]
            row[index] = rescalers[index] * (count - 1)
            factors.append(row)
        return factors, float(count)


def block_rows(num_rows: int, width: int) -> int:
    """Return how many rows of a modality's weight [num_rows, width] are reconstructed together.

    All blocks have about the same size: a short last one would take as long as a full one.
    """
    max_rows = max(BLOCK_ROWS, BLOCK_ENTRIES // width)
    num_blocks = -(-num_rows // max_rows)
    even_rows = -(-num_rows // num_blocks)
    return min(num_rows, -(-even_rows // ROW_STEP) * ROW_STEP)
