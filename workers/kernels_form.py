"""A modality's weights formed straight from packed bits: base + (Σ cⱼmⱼ / d)∘τ⋆, in one pass over the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch

from mmerge.workers.dtypes import SAFETENSORS_DTYPES
from mmerge.workers.kernels import CODES, TILE_ENTRIES, compiled, narrow, widen

THREAD_ENTRIES = 1 << 18
"""Below this many entries a thread costs more than it saves."""


@compiled
def form_rows(
    base: Any, base_code: int, delta: Any, delta_code: int, masks: Any, factors: Any, divisor: Any, out: Any, out_code: int, width: int
) -> None:
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)·delta, row by row.

    `base`, `delta` and `out` are bytes [rows, …] of `width` entries a row; `masks` are packed bits [experts, rows, …], the first
    entry in the most significant bit; `factors` and `divisor` are float32. Computed in float32, rounded once.
    """
    bits = np.empty(TILE_ENTRIES // 8, np.uint64)
    flags = bits.view(np.uint8)
    values = np.empty(TILE_ENTRIES, np.float32)
    change = np.empty(TILE_ENTRIES, np.float32)
    share = np.empty(TILE_ENTRIES, np.float32)
    for row in range(out.shape[0]):
        for start in range(0, width, TILE_ENTRIES):
            count = min(TILE_ENTRIES, width - start)
            widen(base[row], base_code, start, count, values)
            widen(delta[row], delta_code, start, count, change)
            for expert in range(factors.shape[0]):
                packed = masks[expert, row, start // 8 : (start + count + 7) // 8]
                for i in range(packed.shape[0]):
                    # Byte k of the word becomes bit 7 − k: the product brings it to bit 7 of that byte, and nothing else there.
                    bits[i] = ((np.uint64(packed[i]) * np.uint64(0x8040201008040201)) >> np.uint64(7)) & np.uint64(0x0101010101010101)
                factor = factors[expert]
                if expert == 0:
                    for i in range(count):
                        share[i] = factor * np.float32(flags[i])
                else:
                    for i in range(count):
                        share[i] += factor * np.float32(flags[i])
            for i in range(count):
                values[i] = values[i] + (share[i] / divisor) * change[i]
            narrow(values, out_code, count, out[row], start)


@cache
def _open_threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-form")


def can_form(*tensors: torch.Tensor) -> bool:
    """Return whether the compiled loop takes these tensors: contiguous, on the CPU, float32, bfloat16 or float16."""
    return all(
        tensor.device.type == "cpu" and tensor.is_contiguous() and SAFETENSORS_DTYPES.get(tensor.dtype) in CODES for tensor in tensors
    )


def form(
    base: torch.Tensor, delta: torch.Tensor, masks: torch.Tensor, *, factors: Sequence[float], divisor: float, out: torch.Tensor
) -> None:
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)∘delta to `out`, with as many threads as torch uses.

    Args:
        base, delta: [rows, width]; see `can_form`.
        masks: packed by rows (`masks.pack_rows`), uint8 [experts, rows, ⌈width/8⌉].
        factors: one per expert.
        divisor: of their sum.
        out: [rows, width], of any dtype that `can_form` takes.
    """
    if out.numel() == 0:
        return
    rows = out.shape[0]
    num_threads = min(torch.get_num_threads(), max(1, out.numel() // THREAD_ENTRIES), rows)
    if num_threads <= 1:
        _form(base, delta, masks, factors, divisor, out)
        return
    bounds = [rows * index // num_threads for index in range(num_threads + 1)]
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    pool = _open_threads(num_threads - 1)
    waiting = [pool.submit(_form, base[part], delta[part], masks[:, part], factors, divisor, out[part]) for part in parts[1:]]
    _form(base[parts[0]], delta[parts[0]], masks[:, parts[0]], factors, divisor, out[parts[0]])
    for future in waiting:
        future.result()


def _form(
    base: torch.Tensor, delta: torch.Tensor, masks: torch.Tensor, factors: Sequence[float], divisor: float, out: torch.Tensor
) -> None:
    rows, width = out.shape
    # Rows that end on whole bytes of bits are one long row: fewer, fuller tiles.
    joined = (1, rows * width) if width % 8 == 0 else (rows, width)
    arrays = [tensor.reshape(joined).view(torch.uint8).numpy() for tensor in (base, delta, out)]
    codes = [CODES[SAFETENSORS_DTYPES[tensor.dtype]] for tensor in (base, delta, out)]
    packed = masks.reshape(masks.shape[0], joined[0], -1).numpy() if masks.is_contiguous() else _rows_of(masks, joined[0])
    form_rows(
        arrays[0], codes[0], arrays[1], codes[1], packed,
        np.asarray(factors, dtype=np.float32), np.float32(divisor), arrays[2], codes[2], joined[1],
    )  # fmt: skip


def _rows_of(masks: torch.Tensor, rows: int) -> Any:
    """Return masks of some rows of each expert, without a copy: the rows of one expert lie behind each other."""
    experts, own_rows, num_bytes = masks.shape
    shape = (experts, rows, own_rows * num_bytes // rows)
    return torch.as_strided(masks, shape, (masks.stride(0), shape[2], 1)).numpy()
