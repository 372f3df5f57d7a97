"""Tensors in huge pages are ordinary tensors that hold their own bytes alone."""

from __future__ import annotations

import sys

import pytest
import torch

from mmerge.workers.runtime.host_memory import HUGE_BYTES, empty_tensor, resident_bytes


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(), (0, 4), (3, 5), (5, 1 << 20)])
def test_a_tensor_has_its_shape_its_own_bytes_and_the_alignment_of_a_cache_line(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = empty_tensor(shape, dtype=dtype).fill_(1)
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    assert tensor.untyped_storage().nbytes() == tensor.nbytes, (
        "a copy or a file of a tensor has its own bytes alone"
    )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc"
)
def test_resident_memory_counts_pages_that_were_written() -> None:
    before = resident_bytes("VmRSS")
    # Larger than any block that malloc takes from its heaps, whose pages may be resident already.
    tensor = empty_tensor((16 * HUGE_BYTES,), dtype=torch.uint8).fill_(1)
    grown = resident_bytes("VmRSS") - before
    assert 0.9 * tensor.nbytes < grown < 1.3 * tensor.nbytes
    assert resident_bytes("VmHWM") >= resident_bytes("VmRSS") > 0
