"""The arithmetic against a naive loop, and the invariants of METHODS."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmerge.workers.methods.combine_rules import disjoint_merge, elect_sign
from mmerge.workers.methods.interface import Block, MergedBlock
from mmerge.workers.methods.locate_rules import trim
from mmerge.workers.methods.mask_rules import decouple
from mmerge.workers.methods.mmer import Mmer, MmerExpertParameters, MmerParameters
from mmerge.workers.statistics.order_statistics import exact_threshold


def make_deltas(num_experts: int, seed: int, size: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/64 in float32: exact sums, many ties, many zeros.
    return [(torch.randn(size, generator=generator) * 8).round() / 64 for _ in range(num_experts)]


def merge(
    deltas: list[torch.Tensor],
    *,
    density: float = 0.8,
    mask_scale: float = 0.75,
    reduction: str = "sum",
    dtype: torch.dtype = torch.float32,
) -> MergedBlock:
    base = torch.zeros_like(deltas[0])
    thresholds = [exact_threshold(delta, density=density) for delta in deltas]
    parameters = MmerParameters.model_validate(
        {"density": density, "reduction": reduction, "mask_scale": mask_scale}
    )
    return Mmer().merge_block(
        Block(base, deltas, thresholds, dtype),
        parameters,
        [MmerExpertParameters.model_validate({}) for _ in deltas],
    )


def naive(
    deltas: list[torch.Tensor], density: float, mask_scale: float, reduction: str
) -> tuple[list[float], list[list[bool]]]:
    columns = [delta.tolist() for delta in deltas]
    trimmed = []
    for column in columns:
        rank = len(column) - int(density * len(column))
        threshold = sorted(abs(value) for value in column)[rank - 1] if rank else 0.0
        trimmed.append([value if abs(value) >= threshold else 0.0 for value in column])
    merged: list[float] = []
    masks: list[list[bool]] = [[] for _ in columns]
    for values in zip(*trimmed, strict=True):
        total = sum(values)
        agreeing = [value for value in values if value * total > 0]
        star = sum(agreeing) / (len(agreeing) if reduction == "mean" else 1) if agreeing else 0.0
        merged.append(star)
        for mask, value in zip(masks, values, strict=True):
            mask.append(star * value > 0 and abs(value) >= mask_scale * 0.5 * abs(star))
    return merged, masks


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(0, 10**6),
    st.sampled_from([0.2, 0.5, 0.8, 1.0]),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.sampled_from(["sum", "mean"]),
)
def test_a_block_is_merged_as_a_naive_loop_merges_it(
    n: int, seed: int, density: float, mask_scale: float, reduction: str
) -> None:
    deltas = make_deltas(n, seed)
    found = merge(deltas, density=density, mask_scale=mask_scale, reduction=reduction)
    merged, masks = naive(deltas, density, mask_scale, reduction)
    torch.testing.assert_close(found.values, torch.tensor(merged), rtol=1e-6, atol=1e-7)
    for mask, expected in zip(found.masks, masks, strict=True):
        assert mask.tolist() == expected


def test_trim_keeps_every_entry_at_the_threshold() -> None:
    delta = torch.tensor([0.5, -0.5, 0.25, 0.5, 0.0])
    assert trim(delta, threshold=0.5).tolist() == [0.5, -0.5, 0.0, 0.5, 0.0]


def test_a_zero_sum_elects_nothing() -> None:
    deltas = [torch.tensor([1.0, 1.0]), torch.tensor([-1.0, 2.0])]
    sign = elect_sign(deltas)
    assert sign.tolist() == [0.0, 1.0]
    assert disjoint_merge(deltas, sign, reduction="sum").tolist() == [0.0, 3.0]


def test_one_expert_gives_its_trimmed_task_vector_and_a_mask_on_its_support() -> None:
    (delta,) = make_deltas(1, 3)
    found = merge([delta], density=0.6)
    trimmed = trim(delta, threshold=exact_threshold(delta, density=0.6))
    assert found.values.equal(trimmed)
    assert found.masks[0].equal(trimmed != 0)
    assert found.values.equal(merge([delta], density=0.6, reduction="mean").values)


@given(st.permutations(range(4)))
@settings(deadline=None, max_examples=10)
def test_the_order_of_experts_does_not_matter(order: list[int]) -> None:
    deltas = make_deltas(4, 11)
    one, other = merge(deltas), merge([deltas[index] for index in order])
    assert one.values.equal(other.values)
    for position, index in enumerate(order):
        assert other.masks[position].equal(one.masks[index])


def test_a_larger_mask_scale_never_adds_a_bit() -> None:
    deltas = make_deltas(3, 5)
    previous = merge(deltas, mask_scale=0.1).masks
    for mask_scale in (0.3, 0.6, 0.75, 0.9, 1.0, 1.5):
        masks = merge(deltas, mask_scale=mask_scale).masks
        assert all(
            not bool((mask & ~before).any()) for mask, before in zip(masks, previous, strict=True)
        )
        previous = masks


def test_at_mask_scale_one_no_flipped_bit_brings_an_expert_nearer() -> None:
    deltas = make_deltas(3, 7)
    found = merge(deltas, mask_scale=1.0)
    for delta, mask in zip(found.trimmed, found.masks, strict=True):
        kept, dropped = (found.values - delta).abs(), delta.abs()
        chosen = torch.where(mask, kept, dropped)
        assert bool((chosen <= torch.where(mask, dropped, kept) + 1e-7).all())


def test_masks_are_right_for_the_bytes_that_are_stored() -> None:
    deltas = [torch.randn(4000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    found = merge(deltas, mask_scale=1.0, dtype=torch.bfloat16)
    assert found.values.dtype == torch.bfloat16
    for delta, mask in zip(found.trimmed, found.masks, strict=True):
        assert mask.equal(decouple(delta, found.values.float(), mask_scale=1.0))


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_scaling_all_task_vectors_scales_the_merge_and_leaves_the_masks(scale: float) -> None:
    deltas = make_deltas(3, 9)
    one, other = merge(deltas), merge([scale * delta for delta in deltas])
    assert other.values.equal(scale * one.values)
    assert all(a.equal(b) for a, b in zip(one.masks, other.masks, strict=True))
