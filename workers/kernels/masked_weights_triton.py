"""A modality's weights formed on a CUDA device, straight from packed bits, by Triton. Imported only
where such a device is used.
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
"""Entries of one row that a program forms: 8 a thread with 4 warps, loads of 16 bytes in the 16-bit
dtypes.
"""


def _form_block(  # type: ignore[no-untyped-def]
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
    share = tl.zeros((BLOCK,), dtype=tl.float32)
    for expert in tl.static_range(NUM_EXPERTS):
        packed = tl.load(
            masks + expert * expert_bytes + row * row_bytes + columns // 8, mask=is_inside, other=0
        )
        bits = (packed.to(tl.int32) >> (7 - columns % 8)) & 1
        share += tl.load(factors + expert) * bits.to(tl.float32)
    places = row * width + columns
    value = tl.load(base + places, mask=is_inside, other=0).to(tl.float32)
    change = tl.load(delta + places, mask=is_inside, other=0).to(tl.float32)
    # The plain division of Triton is approximate; this one is the reference's.
    value += tl.div_rn(share, divisor + tl.zeros_like(share)) * change
    if out.dtype.element_ty == tl.bfloat16:
        # Rounded to even by hand: Triton's interpreter, in which this is tested, cuts the lower
        # bits off.
        word = value.to(tl.uint32, bitcast=True)
        rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
        rounded = tl.where((word & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(out + places, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=is_inside)
    else:
        tl.store(out + places, value.to(out.dtype.element_ty), mask=is_inside)


_form_kernel: Any = triton.jit(_form_block)


def form_on_device(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    out: torch.Tensor,
) -> None:
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)∘delta to `out`: computed in float32 and rounded
    once, as the plain torch reference.

    Args:
        base, delta: [rows, width], contiguous, float32, bfloat16 or float16 each.
        masks: packed by rows (`masks.pack_rows`), uint8 [experts, rows, ⌈width/8⌉]; the rows of one
            expert lie behind each other.
        factors: one per expert.
        divisor: of their sum.
        out: [rows, width], contiguous, of any of these dtypes.
    """
    rows, width = out.shape
    if not out.numel():
        return
    held = _factors_on(base.device, tuple(factors))
    grid = (rows, -(-width // BLOCK_ENTRIES))
    # Without fused multiply-adds: the bits are those of separate operations.
    _form_kernel[grid](
        base, delta, masks, held, out, float(divisor), width, masks.stride(0), masks.shape[2],
        NUM_EXPERTS=len(factors), BLOCK=BLOCK_ENTRIES, enable_fp_fusion=False,
    )  # fmt: skip


@cache
def _factors_on(device: torch.device, factors: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(factors, dtype=torch.float32, device=device)
