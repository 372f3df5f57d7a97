"""Linear layers that multiply each token with the weights of its own modality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mmerge.workers.reader import combine

TEXT = -1
"""The modality id of text tokens, generated ones included. Expert i of a composite has the id i."""


class Routing:
    """Which modality each position of the running forward pass has; shared by all layers of a model."""

    def __init__(self) -> None:
        self.modality_ids: torch.Tensor | None = None

    @contextmanager
    def prefill(self, modality_ids: torch.Tensor) -> Iterator[None]:
        """Route the forward passes inside by `modality_ids`, int64 [batch, tokens]; outside, every token is text."""
        self.modality_ids = modality_ids
        try:
            yield
        finally:
            self.modality_ids = None


class RoutedLinear(nn.Module):
    """A Linear whose weights are θ₀ + mᵢ∘τ⋆ for tokens of modality i and θ₀ + m̄∘τ⋆ for text (MMER, Expansion).

    The text weights are resident, so that decoding costs what a plain Linear costs. A modality's weights are formed from
    base, merged task vector and packed mask when a prefill has tokens of that modality; tokens are gathered, so each is
    multiplied once.
    """

    def __init__(
        self,
        routing: Routing,
        *,
        base: torch.Tensor,
        delta: torch.Tensor,
        masks: Sequence[torch.Tensor],
        dtype: torch.dtype,
        bias: RoutedBias | None = None,
        rescalers: Sequence[float] = (),
    ) -> None:
        """Make a layer from θ₀ and τ⋆, both [out, in], one packed mask per expert, and the factors on them where there are any."""
        super().__init__()
        self._routing = routing
        self._rescalers = list(rescalers) or [1.0] * len(masks)
        self.weight = nn.Parameter(combine(base, delta, list(masks), dtype=dtype, rescalers=self._rescalers), requires_grad=False)
        self.base: torch.Tensor
        self.delta: torch.Tensor
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("delta", delta, persistent=False)
        for index, mask in enumerate(masks):
            self.register_buffer(f"mask{index}", mask, persistent=False)
        self.num_experts = len(masks)
        self.bias = bias

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return int(self.weight.shape[1])

    def modality_weight(self, index: int) -> torch.Tensor:
        """Return θ₀ + mᵢ∘τ⋆ of expert `index`, [out, in], in the layer's dtype."""
        mask, factor = self.get_buffer(f"mask{index}"), self._rescalers[index]
        return combine(self.base, self.delta, [mask], dtype=self.weight.dtype, rescalers=[factor])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return [batch, tokens, out] for inputs [batch, tokens, in]."""
        ids = self._routing.modality_ids
        if ids is None or bool((ids == TEXT).all()):
            return nn.functional.linear(inputs, self.weight, self.bias.text if self.bias else None)
        if ids.shape != inputs.shape[:-1]:
            raise ValueError(f"routing is for tokens {tuple(ids.shape)}, the layer got {tuple(inputs.shape[:-1])}")
        outputs = inputs.new_empty(*inputs.shape[:-1], self.out_features)
        for index in range(TEXT, self.num_experts):
            chosen = ids == index
            if bool(chosen.any()):
                weight = self.weight if index == TEXT else self.modality_weight(index)
                outputs[chosen] = nn.functional.linear(inputs[chosen], weight, self.bias.of(index) if self.bias else None)
        return outputs


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
