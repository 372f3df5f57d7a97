from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmerge.workers.reconstruction.bitmask import mean_mask, pack_mask, packed_bytes, unpack_mask
from mmerge.workers.reconstruction.masked_weights import add_masked_tensor


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_a_packed_mask_unpacks_to_itself_and_ends_on_a_word(bits: list[bool]) -> None:
    mask = torch.tensor(bits)
    packed = pack_mask(mask)
    assert packed.numel() == packed_bytes(len(bits))
    assert packed.numel() % 8 == 0
    assert unpack_mask(packed, mask.shape).equal(mask)


def test_the_first_entry_is_the_most_significant_bit_as_numpy_packs() -> None:
    mask = torch.tensor([True, False, False, False, False, False, False, True, True])
    assert pack_mask(mask).tolist() == [0b10000001, 0b10000000, 0, 0, 0, 0, 0, 0]
    assert np.packbits(mask.numpy()).tolist() == [0b10000001, 0b10000000]


def test_the_mean_mask_is_the_share_of_experts_that_want_an_entry() -> None:
    masks = [
        torch.tensor([1, 1, 0, 0]).bool(),
        torch.tensor([1, 0, 1, 0]).bool(),
        torch.tensor([1, 0, 0, 0]).bool(),
    ]
    torch.testing.assert_close(mean_mask(masks), torch.tensor([1, 1 / 3, 1 / 3, 0]))


@pytest.mark.parametrize("num_masks", [1, 2, 3])
def test_combining_is_base_plus_mean_mask_times_delta_entry_by_entry(num_masks: int) -> None:
    generator = torch.Generator().manual_seed(num_masks)
    base, delta = torch.randn(2, 5, 7, generator=generator).to(torch.bfloat16)
    masks = [torch.rand(5, 7, generator=generator) < 0.5 for _ in range(num_masks)]
    found = add_masked_tensor(
        base,
        delta,
        [pack_mask(mask) for mask in masks],
        factors=[1.0] * len(masks),
        dtype=torch.float32,
    )
    for row in range(5):
        for column in range(7):
            share = sum(bool(mask[row, column]) for mask in masks) / num_masks
            assert found[row, column].item() == pytest.approx(
                base[row, column].item() + share * delta[row, column].item(), abs=1e-6
            )
