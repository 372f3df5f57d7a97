"""Each token is multiplied by the weights of its own modality, and by no others."""

from __future__ import annotations

import pytest
import torch

from mmerge.workers.composite import routed_linear
from mmerge.workers.composite.routed_linear import (
    Policy,
    RoutedBias,
    RoutedLinear,
    RoutedWeights,
    block_rows,
)
from mmerge.workers.composite.routing import TEXT, Routing
from mmerge.workers.composite.token_groups import make_groups
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows
from mmerge.workers.reconstruction.masked_weights import add_masked_delta

NUM_EXPERTS, OUT, IN = 3, 7, 12


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base, delta = (torch.randn(OUT, IN, generator=generator) for _ in range(2))
    return (
        base,
        delta,
        [torch.rand(OUT, IN, generator=generator) < share for share in (0.2, 0.5, 0.8)],
    )


def make_layer(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]],
    *,
    bias: RoutedBias | None = None,
    policy: Policy = "packed",
) -> RoutedLinear:
    base, delta, masks = weights
    packed = torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks])
    return RoutedLinear(
        Routing(),
        RoutedWeights.from_masks(base, delta, packed, dtype=torch.float32, policy=policy),
        bias=bias,
    )


@pytest.mark.parametrize("policy", ["packed", "resident"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_token_gets_what_a_loop_over_tokens_with_formed_weights_gives(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]], has_bias: bool, policy: Policy
) -> None:
    base, delta, masks = weights
    bias = (
        RoutedBias(torch.randn(OUT), [torch.randn(OUT) for _ in range(NUM_EXPERTS)])
        if has_bias
        else None
    )
    layer = make_layer(weights, bias=bias, policy=policy)
    inputs = torch.randn(2, 9, IN)
    ids = torch.tensor([[TEXT, 0, 0, 1, 2, TEXT, 2, 1, TEXT], [2, 2, 2, TEXT, TEXT, 1, 0, TEXT, 0]])
    with layer._routing.prefill(ids):
        found = layer(inputs)
    for row in range(2):
        for place in range(9):
            modality = int(ids[row, place])
            mask = (
                torch.stack(masks).float().mean(dim=0)
                if modality == TEXT
                else masks[modality].float()
            )
            expected = (base + mask * delta) @ inputs[row, place]
            if bias is not None:
                expected = expected + bias.of(modality)
            torch.testing.assert_close(found[row, place], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_matrix_that_is_formed_in_blocks_multiplies_as_one_that_is_kept(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routed_linear, "BLOCK_ENTRIES", 1)
    monkeypatch.setattr(routed_linear, "BLOCK_ROWS", 100)
    rows = 300
    generator = torch.Generator().manual_seed(1)
    base, delta = (torch.randn(rows, IN, generator=generator) for _ in range(2))
    weights = (
        base,
        delta,
        [torch.rand(rows, IN, generator=generator) < share for share in (0.2, 0.5, 0.8)],
    )
    bias = (
        RoutedBias(torch.randn(rows), [torch.randn(rows) for _ in range(NUM_EXPERTS)])
        if has_bias
        else None
    )
    assert block_rows(rows, IN) == 128
    packed, resident = (
        make_layer(weights, bias=bias, policy=policy) for policy in ("packed", "resident")
    )
    inputs = torch.randn(1, 9, IN)
    ids = torch.tensor(
        [[TEXT, TEXT, 0, 0, 1, 2, 1, 2, TEXT]]
    )  # a run, and tokens of the others between each other
    with packed._routing.prefill(ids), resident._routing.prefill(ids):
        torch.testing.assert_close(packed(inputs), resident(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "width", "expected"),
    [(5632, 2048, 960), (2048, 5632, 1024), (2560, 8192, 896), (1100, 512, 1100), (7, 12, 7)],
)
def test_blocks_that_are_formed_have_about_one_size(rows: int, width: int, expected: int) -> None:
    found = block_rows(rows, width)
    assert found == expected
    assert (rows % found or found) > found // 2


def test_what_a_layer_returns_can_be_differentiated_by_its_inputs(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]],
) -> None:
    layer = make_layer(weights)
    inputs = torch.randn(1, 4, IN, requires_grad=True)
    with layer._routing.prefill(torch.tensor([[TEXT, 0, 0, 1]])):
        layer(inputs).sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(
        inputs.grad[0, 1], layer.modality_weight(0).sum(dim=0), rtol=1e-5, atol=1e-5
    )


def test_outside_of_a_prefill_every_token_is_text(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]],
) -> None:
    layer = make_layer(weights)
    inputs = torch.randn(1, 4, IN)
    with layer._routing.prefill(torch.zeros(1, 4, dtype=torch.long)):
        routed = layer(inputs)
    base, delta, masks = weights
    torch.testing.assert_close(
        layer(inputs), inputs @ (base + torch.stack(masks).float().mean(dim=0) * delta).T
    )
    assert not torch.allclose(layer(inputs), routed)


def test_a_routing_of_another_length_is_refused(
    weights: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]],
) -> None:
    layer = make_layer(weights)
    with (
        layer._routing.prefill(torch.zeros(1, 3, dtype=torch.long)),
        pytest.raises(ValueError, match=r"routing is for tokens \(1, 3\)"),
    ):
        layer(torch.randn(1, 4, IN))


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("factors", [[2.0, -1.0, 0.7], [2.0, -1.0, -1.0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 12), (3, 2049), (260, 2049), (130, 4104)])
def test_the_compiled_loop_gives_the_bits_of_the_torch_reference(
    shape: tuple[int, int],
    dtype: torch.dtype,
    factors: list[float],
    num_threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator).to(dtype)
    delta = torch.randn(shape, generator=generator).to(
        torch.bfloat16 if dtype == torch.float32 else dtype
    )
    masks = [torch.rand(shape, generator=generator) < share for share in (0.2, 0.5, 0.8)]
    packed = torch.stack([pack_rows(pack_mask(mask), shape) for mask in masks])
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        found = add_masked_delta(base, delta, packed, factors=factors, divisor=3.0)
        place = torch.full((shape[0] + 2, shape[1]), torch.nan, dtype=dtype)
        rows = slice(1, shape[0])  # masks of some rows do not lie behind each other
        add_masked_delta(
            base[rows],
            delta[rows],
            packed[:, rows],
            factors=factors,
            divisor=3.0,
            out=place[1 : shape[0]],
        )
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(
        "mmerge.workers.reconstruction.masked_weights.can_use_numba", lambda *tensors: False
    )
    assert found.equal(add_masked_delta(base, delta, packed, factors=factors, divisor=3.0))
    share = (
        sum(
            torch.tensor(factor) * mask.float() for factor, mask in zip(factors, masks, strict=True)
        )
        / 3
    )
    assert found.equal((base.float() + share * delta.float()).to(dtype))
    assert place[1 : shape[0]].equal(found[rows])
    assert place[[0, shape[0], shape[0] + 1]].isnan().all()


def test_blocks_of_a_prefill_share_memory_that_is_freed_with_it() -> None:
    routing = Routing()
    like = torch.empty(0, dtype=torch.bfloat16)
    with routing.prefill(torch.zeros(1, 4, dtype=torch.long)):
        first, second = (routing.scratch(shape, like=like) for shape in ((4, 8), (2, 8)))
        assert (first.shape, second.shape, first.dtype) == ((4, 8), (2, 8), torch.bfloat16)
        assert first.data_ptr() == second.data_ptr()
        assert routing.scratch((8, 8), like=like).shape == (8, 8)
        assert routing._scratch
    assert not routing._scratch


def test_packed_and_resident_weights_differ_by_roundings_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    base, delta = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(2))
    masks = [torch.rand(64, 64, generator=generator) < 0.5 for _ in range(NUM_EXPERTS)]
    packed = torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks])
    layers = {
        policy: RoutedLinear(
            Routing(),
            RoutedWeights.from_masks(base, delta, packed, dtype=torch.bfloat16, policy=policy),
        )
        for policy in ("packed", "resident")
    }
    for index, mask in enumerate(masks):
        exact = (base.float() + mask * delta.float()).bfloat16()
        assert layers["resident"].modality_weight(index).equal(exact)
        text = layers["packed"].weight.float().abs()
        error = (layers["packed"].modality_weight(index).float() - exact.float()).abs()
        assert bool(
            (error <= 2**-8 * 1.01 * (text + 2 * exact.float().abs())).all()
        )  # of θ_text, and of both results


def test_the_factors_of_masks_scale_what_a_modality_takes() -> None:
    generator = torch.Generator().manual_seed(3)
    base, delta = (torch.randn(OUT, IN, generator=generator) for _ in range(2))
    masks = [torch.rand(OUT, IN, generator=generator) < 0.5 for _ in range(2)]
    packed = torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks])
    for policy in ("packed", "resident"):
        weights = RoutedWeights.from_masks(
            base, delta, packed, dtype=torch.float32, policy=policy, rescalers=[1.5, 0.5]
        )
        layer = RoutedLinear(Routing(), weights)
        torch.testing.assert_close(
            layer.weight.detach(),
            base + (1.5 * masks[0].float() + 0.5 * masks[1].float()) / 2 * delta,
        )
        torch.testing.assert_close(layer.modality_weight(0), base + 1.5 * masks[0] * delta)
        torch.testing.assert_close(layer.modality_weight(1), base + 0.5 * masks[1] * delta)


def test_a_single_expert_keeps_no_more_than_a_plain_linear() -> None:
    base, delta, mask = torch.randn(8, 8), torch.randn(8, 8), torch.rand(8, 8) < 0.5
    weights = RoutedWeights.from_masks(
        base, delta, pack_rows(pack_mask(mask), mask.shape)[None], dtype=torch.float32
    )
    assert weights.delta is None
    assert weights.masks is None
    assert RoutedLinear(Routing(), weights).modality_weight(0).equal(weights.text)


def test_tokens_in_runs_are_not_copied_and_scattered_ones_are_gathered() -> None:
    ids = torch.tensor([[TEXT, 0, 0, 1], [1, TEXT, 1, TEXT]])
    groups = {group.modality: group for group in make_groups(ids)}
    assert groups[0].positions == slice(1, 3)
    values = torch.arange(16.0).reshape(8, 2)
    assert groups[0].gather(values).data_ptr() == values[1:].data_ptr()
    assert groups[1].gather(values).equal(values[[3, 4, 6]])
    assert groups[TEXT].gather(values).equal(values[[0, 5, 7]])
