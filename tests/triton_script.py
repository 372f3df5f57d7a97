"""Compare the Triton kernel with the plain torch reference, bit by bit.

Run with TRITON_INTERPRET=1, or on a CUDA device.
"""

from __future__ import annotations

import itertools
import sys

import torch

from mmerge.workers.kernels.masked_weights_triton import add_masked_delta_by_triton
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows
from mmerge.workers.reconstruction.masked_weights import add_masked_delta_by_torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 7), (5, 8), (2, 1023), (3, 1024), (2, 1025), (1, 2500))


def compare(device: str) -> int:
    """Return how many cases were compared. Raises AssertionError at the first that differs."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for number, ((rows, width), num_experts) in enumerate(itertools.product(SHAPES, (1, 3, 5))):
        for base_dtype, delta_dtype in itertools.product(DTYPES, DTYPES):
            base = torch.randn(rows, width, generator=generator).to(base_dtype)
            delta = torch.randn(rows, width, generator=generator).to(delta_dtype)
            masks = [torch.rand(rows, width, generator=generator) < 0.5 for _ in range(num_experts)]
            packed = torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks]).to(
                device
            )
            factors = (
                [1.3, -0.7, 0.25, 1.0, -2.0][:num_experts]
                if number % 2
                else [num_experts - 1.0] + [-1.0] * (num_experts - 1)
            )
            numbers = {"factors": factors, "divisor": float(num_experts)}
            out_dtype = DTYPES[number % 3]
            # Rows of a larger matrix, as a layer gives them: the experts' masks are apart by more
            # than these rows.
            for which in (slice(None), slice(rows // 2, None)):
                inputs = (base[which].to(device), delta[which].to(device), packed[:, which])
                actual, expected = (
                    torch.empty(inputs[0].shape, dtype=out_dtype, device=device) for _ in range(2)
                )
                add_masked_delta_by_triton(*inputs, out=actual, **numbers)
                add_masked_delta_by_torch(*inputs, out=expected, **numbers)
                assert torch.equal(actual, expected), (
                    rows,
                    width,
                    num_experts,
                    base_dtype,
                    delta_dtype,
                    out_dtype,
                    which,
                )
                count += 1
    return count


if __name__ == "__main__":
    sys.stdout.write(str(compare(sys.argv[1])))
