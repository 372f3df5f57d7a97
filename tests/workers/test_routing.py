"""Each token is multiplied by the weights of its own modality, and by no others."""

from __future__ import annotations

import pytest
import torch

from mmerge.workers.masks import mean_mask, pack_mask, pack_rows
from mmerge.workers.routing import TEXT, Policy, RoutedBias, RoutedLinear, RoutedWeights, Routing, form_weight

NUM_EXPERTS, OUT, IN = 3, 7, 12


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base, delta = (torch.randn(OUT, IN, generator=generator) for _ in range(2))
    return base, delta, [torch.rand(OUT, IN, generator=generator) < share for share in (0.2, 0.5, 0.8)]


def make_layer(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], *, bias: RoutedBias | None = None, policy: Policy = "packed"
) -> RoutedLinear:
    base, delta, masks = weights
    packed = torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks])
    return RoutedLinear(Routing(), RoutedWeights.make(base, delta, packed, dtype=torch.float32, policy=policy), bias=bias)


@pytest.mark.parametrize("policy", ["packed", "resident"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_token_gets_what_a_loop_over_tokens_with_formed_weights_gives(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], has_bias: bool, policy: Policy
) -> None:
    base, delta, masks = weights
    bias = RoutedBias(torch.randn(OUT), [torch.randn(OUT) for _ in range(NUM_EXPERTS)]) if has_bias else None
    layer = make_layer(weights, bias=bias, policy=policy)
    inputs = torch.randn(2, 9, IN)
    ids = torch.tensor([[TEXT, 0, 0, 1, 2, TEXT, 2, 1, TEXT], [2, 2, 2, TEXT, TEXT, 1, 0, TEXT, 0]])
    with layer._routing.prefill(ids):
        found = layer(inputs)
    for row in range(2):
        for place in range(9):
            modality = int(ids[row, place])
            mask = mean_mask(masks) if modality == TEXT else masks[modality].float()
            wanted = (base + mask * delta) @ inputs[row, place]
            if bias is not None:
                wanted = wanted + bias.of(modality)
            torch.testing.assert_close(found[row, place], wanted, rtol=1e-5, atol=1e-5)


def test_outside_of_a_prefill_every_token_is_text(weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> None:
    layer = make_layer(weights)
    inputs = torch.randn(1, 4, IN)
    with layer._routing.prefill(torch.zeros(1, 4, dtype=torch.long)):
        routed = layer(inputs)
    base, delta, masks = weights
    torch.testing.assert_close(layer(inputs), inputs @ (base + mean_mask(masks) * delta).T)
    assert not torch.allclose(layer(inputs), routed)


def test_a_routing_of_another_length_is_refused(weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]) -> None:
    layer = make_layer(weights)
    with layer._routing.prefill(torch.zeros(1, 3, dtype=torch.long)), pytest.raises(ValueError, match=r"routing is for tokens \(1, 3\)"):
        layer(torch.randn(1, 4, IN))
