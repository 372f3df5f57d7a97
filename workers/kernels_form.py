"""A modality's weights formed straight from packed bits: base + (Σ cⱼmⱼ / d)∘τ⋆, in one pass over the bytes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.workers.dtypes import SAFETENSORS_DTYPES
from mmerge.workers.kernels import CODES, TILE_ENTRIES, compiled, from_bits, narrow, select, to_bits, widen

Bytes = NDArray[np.uint8]

CHUNK_ENTRIES = 8 * TILE_ENTRIES
"""Entries whose bits are counted at once."""
THREAD_ENTRIES = 1 << 18
"""Below this many entries a thread costs more than it saves."""


@compiled
def form_rows(
    base: Any, base_code: int, delta: Any, delta_code: int, masks: Any, factors: Any, divisor: Any, out: Any, out_code: int, width: int,
    is_in_place: bool,
) -> None:  # fmt: skip
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)·delta, row by row.

    `base`, `delta` and `out` are bytes [rows, …] of `width` entries a row; `masks` are packed bits [experts, rows, …], the first
    entry in the most significant bit; `factors` and `divisor` are float32. Computed in float32, rounded once. `is_in_place` says that
    `out` is `base`.
    """
    bits = np.empty(CHUNK_ENTRIES // 8, np.uint64)
    counts = bits.view(np.uint8)
    values, change, share = np.empty(TILE_ENTRIES, np.float32), np.empty(TILE_ENTRIES, np.float32), np.empty(CHUNK_ENTRIES, np.float32)
    are_small = _are_small(factors)
    tables = _tabulate(factors) if are_small else np.empty((0, 256), np.uint64)
    surplus = _surplus(factors) if are_small else np.int32(0)
    inverse = _exact_inverse(factors, divisor) if are_small else np.float32(0)
    is_exact = inverse != np.float32(0)
    is_bfloat16, is_float32 = base_code == 1 and out_code == 1 and delta_code == 1, base_code == 0 and out_code == 0 and delta_code == 1
    for row in range(out.shape[0]):
        for begin in range(0, width, CHUNK_ENTRIES):
            # Bits of several tiles at once: a cache fetches ahead of a reader that stays on one row for some lines.
            length = min(CHUNK_ENTRIES, width - begin)
            for expert in range(factors.shape[0]):
                packed = masks[expert, row, begin // 8 : (begin + length + 7) // 8]
                if are_small:
                    _count(packed, tables[expert], expert == 0, bits)
                else:
                    _spread(packed, bits)
                    _add(bits.view(np.uint8), factors[expert], expert == 0, length, share)
            if is_exact and (is_bfloat16 or is_float32):
                where = slice(begin, begin + length)
                change_words = delta[row].view(np.uint16)[where]
                if is_float32:
                    _combine_float32(
                        base[row].view(np.float32)[where], change_words, counts, surplus, inverse, out[row].view(np.float32)[where]
                    )
                elif is_in_place:
                    _combine_bfloat16_in_place(out[row].view(np.uint16)[where], change_words, counts, surplus, inverse)
                else:
                    _combine_bfloat16(
                        base[row].view(np.uint16)[where], change_words, counts, surplus, inverse, out[row].view(np.uint16)[where]
                    )
                continue
            for start in range(0, length, TILE_ENTRIES):
                count = min(TILE_ENTRIES, length - start)
                widen(base[row], base_code, begin + start, count, values)
                widen(delta[row], delta_code, begin + start, count, change)
                if are_small:
                    _to_share(counts[start : start + count], count, surplus, share[start : start + count])
                _combine(values, share[start : start + count], divisor, change, count)
                narrow(values, out_code, count, out[row], begin + start)


@compiled
def _combine_bfloat16(base: Any, delta: Any, counts: Any, surplus: Any, inverse: Any, out: Any) -> None:
    """Widen, combine and narrow as the tiles do, in one loop whose values stay in registers; all three are bfloat16 as uint16."""
    counts = counts[: out.shape[0]]
    for i in range(out.shape[0]):
        out[i] = _form_bfloat16(base[i], delta[i], counts[i], surplus, inverse)


@compiled
def _combine_bfloat16_in_place(values: Any, delta: Any, counts: Any, surplus: Any, inverse: Any) -> None:
    """The same where the result replaces `base`. Of two arrays that are one the compiled loop would have to assume the worst."""
    counts = counts[: values.shape[0]]
    for i in range(values.shape[0]):
        values[i] = _form_bfloat16(values[i], delta[i], counts[i], surplus, inverse)


@compiled
def _form_bfloat16(base: Any, delta: Any, count: Any, surplus: Any, inverse: Any) -> Any:
    # Each step is cast: integers of 32 bits that meet become 64 wide, and halve the vectors.
    value = from_bits(np.uint32(np.uint32(base) << np.uint32(16)))
    change = from_bits(np.uint32(np.uint32(delta) << np.uint32(16)))
    formed = np.float32(value + (np.float32(np.int32(np.int32(count) - surplus)) * inverse) * change)
    word = to_bits(formed)
    odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(word + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
    return np.uint16(select(np.isnan(formed), np.uint32(0x7FC0), rounded))


@compiled
def _combine_float32(base: Any, delta: Any, counts: Any, surplus: Any, inverse: Any, out: Any) -> None:
    """The same of float32 and a bfloat16 `delta`, for models that are computed in float32. `out` may be `base`."""
    counts = counts[: out.shape[0]]
    for i in range(out.shape[0]):
        change = from_bits(np.uint32(np.uint32(delta[i]) << np.uint32(16)))
        out[i] = base[i] + (np.float32(np.int32(np.int32(counts[i]) - surplus)) * inverse) * change


@compiled
def _to_share(counts: Any, count: int, surplus: Any, share: Any) -> None:
    for i in range(count):
        share[i] = np.float32(np.int32(np.int32(counts[i]) - surplus))


@compiled
def _combine(values: Any, share: Any, divisor: Any, change: Any, count: int) -> None:
    for i in range(count):
        values[i] = values[i] + (share[i] / divisor) * change[i]


@compiled
def _are_small(factors: Any) -> bool:
    """Return whether the sum of the factors' magnitudes is a whole number of a byte: of masks without factors of their own."""
    total = np.float32(0)
    for factor in factors:
        if factor != np.floor(factor):
            return False
        total += abs(factor)
    return bool(total <= np.float32(255))


@compiled
def _surplus(factors: Any) -> Any:
    """Return what sums of `_count` have too much: a factor −f counts f where the bit is 0, so that nothing is below 0."""
    total = np.int32(0)
    for factor in factors:
        if factor < np.float32(0):
            total = np.int32(total + np.int32(-factor))
    return total


@compiled
def _exact_inverse(factors: Any, divisor: Any) -> Any:
    """Return 1 / divisor where its product with any sum of small factors is the quotient, bit by bit; else 0."""
    inverse = np.float32(1) / divisor
    surplus = _surplus(factors)
    for number in range(-surplus, int(np.abs(factors).sum()) - surplus + 1):
        if np.float32(number) * inverse != np.float32(number) / divisor:
            return np.float32(0)
    return inverse


@compiled
def _tabulate(factors: Any) -> Any:
    """Return, for each small factor and each byte of bits, the word whose bytes hold what `_count` adds: see `_surplus`."""
    tables = np.empty((factors.shape[0], 256), np.uint64)
    bits, words = np.arange(256).astype(np.uint8), np.empty(256, np.uint64)
    _spread(bits, words)
    for expert in range(factors.shape[0]):
        magnitude, is_negative = np.uint64(abs(factors[expert])), factors[expert] < np.float32(0)
        for i in range(256):
            counted = words[i] ^ np.uint64(0x0101010101010101) if is_negative else words[i]
            tables[expert, i] = counted * magnitude
    return tables


@compiled
def _spread(packed: Any, words: Any) -> None:
    """Write each byte of bits as a word of eight bytes, 0 or 1."""
    for i in range(packed.shape[0]):
        # Byte k of the word becomes bit 7 − k: the product brings it to bit 7 of that byte, and nothing else there.
        words[i] = ((np.uint64(packed[i]) * np.uint64(0x8040201008040201)) >> np.uint64(7)) & np.uint64(0x0101010101010101)


@compiled
def _count(packed: Any, table: Any, is_first: bool, sums: Any) -> None:
    """Add a small factor to the bytes of `sums` where the bit is 1 (where it is 0, if negative), eight entries a word; `table` is its.

    Looked up: the product that spreads bits takes three instructions per word on the processors that have it, and more on others.
    """
    if is_first:
        for i in range(packed.shape[0]):
            sums[i] = table[packed[i]]
    else:
        for i in range(packed.shape[0]):
            sums[i] = sums[i] + table[packed[i]]


@compiled
def _add(flags: Any, factor: Any, is_first: bool, count: int, share: Any) -> None:
    if is_first:
        for i in range(count):
            share[i] = factor * np.float32(flags[i])
    else:
        for i in range(count):
            share[i] += factor * np.float32(flags[i])


@cache
def _open_threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-form")


def can_form(*tensors: torch.Tensor) -> bool:
    """Return whether the compiled loop takes these tensors: contiguous, on the CPU, float32, bfloat16 or float16."""
    return all(
        tensor.device.type == "cpu" and tensor.is_contiguous() and SAFETENSORS_DTYPES.get(tensor.dtype) in CODES for tensor in tensors
    )


def can_form_on_device(*tensors: torch.Tensor) -> bool:
    """Return whether the Triton kernel takes these tensors: contiguous, on one CUDA device, float32, bfloat16 or float16."""
    return _has_triton() and all(
        tensor.device.type == "cuda" and tensor.is_contiguous() and SAFETENSORS_DTYPES.get(tensor.dtype) in CODES for tensor in tensors
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


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
        np.asarray(factors, dtype=np.float32), np.float32(divisor), arrays[2], codes[2], joined[1], False,
    )  # fmt: skip


class BlockFormer:
    """Forms a matrix block by block, on the thread that calls, from bytes: what is the same for all blocks is prepared once.

    Of a block of half a megabyte the views and lookups of `form` would take a third of the time, and hold Python's lock.
    """

    def __init__(self, *, base: torch.dtype, delta: torch.dtype, out: torch.dtype, factors: Sequence[float], divisor: float) -> None:
        """Prepare; see `form`. The dtypes are those that `can_form` takes."""
        self._codes = [CODES[SAFETENSORS_DTYPES[dtype]] for dtype in (base, delta, out)]
        self._width = out.itemsize
        self._factors, self._divisor = np.asarray(factors, dtype=np.float32), np.float32(divisor)

    def form(self, base: Bytes, delta: Bytes, masks: Bytes, *, out: Bytes) -> None:
        """Write what `form` writes of a block whose entries fill whole bytes of bits.

        `base`, `delta` and `out` are its bytes, uint8 [bytes]; `masks` its packed bits, uint8 [experts, bytes]. `out` may be `base`, of
        the same dtype.
        """
        form_rows(
            base[None], self._codes[0], delta[None], self._codes[1], masks[:, None],
            self._factors, self._divisor, out[None], self._codes[2], len(out) // self._width, out is base,
        )  # fmt: skip


@cache
def load_kernel() -> None:
    """Let the compiled loop be loaded now rather than at its first use."""
    former = BlockFormer(base=torch.bfloat16, delta=torch.bfloat16, out=torch.bfloat16, factors=[1.0], divisor=1.0)
    former.form(np.zeros(16, np.uint8), np.zeros(16, np.uint8), np.zeros((1, 1), np.uint8), out=np.empty(16, np.uint8))


def _rows_of(masks: torch.Tensor, rows: int) -> Any:
    """Return masks of some rows of each expert, without a copy: the rows of one expert lie behind each other."""
    experts, own_rows, num_bytes = masks.shape
    shape = (experts, rows, own_rows * num_bytes // rows)
    return torch.as_strided(masks, shape, (masks.stride(0), shape[2], 1)).numpy()
