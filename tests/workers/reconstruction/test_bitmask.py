from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmerge.manifests.format.object_header import packed_bytes
from mmerge.workers.reconstruction.bitmask import pack_mask, unpack_mask


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
