"""Reconstruct weights on a CUDA device: base + (Σ factorⱼ·mⱼ / divisor)∘delta, in Triton.

Imported only where such a device is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch

# Triton comes with the CUDA builds of torch and is no dependency where there is no GPU: type
# checkers must not look for it.
triton: Any = import_module("triton")
tl: Any = import_module("triton.language")

BLOCK_ENTRIES = 1024
"""Entries of one row per program: with 4 warps 8 per thread, loads of 16 bytes in 16-bit dtypes."""


def _add_block(  # type: ignore[no-untyped-def]
    base,
    delta,
    masks,
    factors,
    out,
    divisor,
    width,
    expert_bytes,
    row_bytes,
    NUM_EXPERTS: tl.constexpr,  # noqa: N803 - constants of a Triton kernel are upper case
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < width
    weights = tl.zeros((BLOCK,), dtype=tl.float32)
    for expert in tl.static_range(NUM_EXPERTS):
        packed = tl.load(
            masks + expert * expert_bytes + row * row_bytes + columns // 8, mask=is_inside, other=0
        )
        bits = (packed.to(tl.int32) >> (7 - columns % 8)) & 1
        weights += tl.load(factors + expert) * bits.to(tl.float32)
    offsets = row * width + columns
    value = tl.load(base + offsets, mask=is_inside, other=0).to(tl.float32)
    change = tl.load(delta + offsets, mask=is_inside, other=0).to(tl.float32)
    # Triton's plain division is approximate; div_rn rounds as the reference does.
    value += tl.div_rn(weights, divisor + tl.zeros_like(weights)) * change
    if out.dtype.element_ty == tl.bfloat16:
        # Rounded to even by bit arithmetic: Triton's interpreter, in which this is tested,
        # truncates.
        word = value.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        rounded = tl.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(out + offsets, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=is_inside)
    else:
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=is_inside)


_add_kernel: Any = triton.jit(_add_block)


def add_masked_delta_by_triton(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    out: torch.Tensor,
) -> None:
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)∘delta to `out`, with the bits of the reference.

    Args:
        base, delta: [rows, width], contiguous, float32, bfloat16 or float16 each.
        masks: packed by rows (`bitmask.pack_rows`), uint8 [experts, rows, ⌈width/8⌉]; the rows of
            one expert are contiguous.
        factors: one per expert.
        divisor: of their sum.
        out: [rows, width], contiguous, of any of these dtypes.
    """
    rows, width = out.shape
    if not out.numel():
        return
    grid = (rows, -(-width // BLOCK_ENTRIES))
    _add_kernel[grid](
        base,
        delta,
        masks,
        _factors_on(base.device, tuple(factors)),
        out,
        float(divisor),
        width,
        masks.stride(0),
        masks.shape[2],
        NUM_EXPERTS=len(factors),
        BLOCK=BLOCK_ENTRIES,
        enable_fp_fusion=False,  # fused multiply-adds would change the bits
    )


@cache
def _factors_on(device: torch.device, factors: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(factors, dtype=torch.float32, device=device)
