"""Compiled loops of the fast path: bytes to float32 tiles, float32 tiles to bytes, sums, bits.

A kernel works through a block tile by tile, 2,048 entries at once: a tile of base and experts stays
in the first caches, and loops over plain arrays of that length are what LLVM turns into vector
code. All functions are single-threaded and release the interpreter's lock, so tasks share a node's
cores as threads or as processes. Arithmetic is float32 without contraction or
reordering: the bits are those of the torch reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numba
import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from mmerge.workers.kernels.kernel_cache import find_cache_folder, store_compiled

TILE_ENTRIES = 2048
"""Entries that a kernel treats at once; blocks begin at whole tiles."""

NUM_LANES = 64
"""Sums that a tile's squares are added to in turn."""

CODES: Mapping[str, int] = {"F32": 0, "BF16": 1, "F16": 2}
"""How kernels name the dtypes that they read and write as bytes."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


_CACHE_FOLDER = find_cache_folder()


def compiled(function: _Function) -> _Function:
    """Return the function compiled at its first call: no lock held, no fastmath, kept on disk for
    the next process.
    """
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy")(function)
    if dispatcher is not function:  # NUMBA_DISABLE_JIT leaves functions as they are
        store_compiled(dispatcher, _CACHE_FOLDER)
    kernel: _Function = dispatcher
    return kernel


@intrinsic  # type: ignore[untyped-decorator]
def _pointer(_: Any, address: Any) -> Any:
    """Return the pointer that an int64 is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint8)(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def select(_: Any, condition: Any, chosen: Any, alternative: Any) -> Any:
    """Return `chosen` where the condition holds, else `alternative`, without a branch.

    Both have one type.
    """
    if condition != types.boolean or chosen != alternative:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return chosen(condition, chosen, alternative), generate


@intrinsic  # type: ignore[untyped-decorator]
def turn_sign(_: Any, value: Any, signed: Any) -> Any:
    """Return a float32 whose sign is turned where the sign of another is set."""
    if value != types.float32 or signed != types.float32:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = context.get_value_type(types.uint32)
        value_bits, signed_bits = (builder.bitcast(argument, bits) for argument in arguments)
        sign = builder.and_(signed_bits, context.get_constant(types.uint32, 1 << 31))
        turned = builder.xor(value_bits, sign)
        return builder.bitcast(turned, context.get_value_type(types.float32))

    return types.float32(value, signed), generate


@intrinsic  # type: ignore[untyped-decorator]
def to_bits(_: Any, value: Any) -> Any:
    """Return the bits of a float32 as uint32."""
    return _recast(value, types.float32, types.uint32)


@intrinsic  # type: ignore[untyped-decorator]
def from_bits(_: Any, bits: Any) -> Any:
    """Return the float32 of bits given as uint32."""
    return _recast(bits, types.uint32, types.float32)


def _recast(argument: Any, expected: Any, target: Any) -> Any:
    if argument != expected:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return target(expected), generate


@compiled
def bytes_at(address: int, count: int) -> Any:
    """Return the array of `count` bytes in memory from `address` on; whoever calls holds that
    memory.
    """
    return carray(_pointer(address), count, np.uint8)


@compiled
def widen_at(address: int, code: int, start: int, count: int, out: Any) -> None:
    """Write `count` entries of the bytes at `address`, from entry `start`, to `out` as float32."""
    width = 4 if code == 0 else 2
    widen(bytes_at(address + start * width, count * width), code, 0, count, out)


@compiled
def subtract_at(address: int, code: int, start: int, count: int, base: Any, out: Any) -> None:
    """Write what `widen_at` does, less `base` entry by entry, to `out`: a tile of a task vector."""
    if code == 1:
        # In one loop: nothing is stored and loaded again.
        words = bytes_at(address + start * 2, count * 2).view(np.uint16)
        for i in range(count):
            out[i] = from_bits(np.uint32(np.uint32(words[i]) << np.uint32(16))) - base[i]
        return
    widen_at(address, code, start, count, out)
    for i in range(count):
        out[i] = out[i] - base[i]


@compiled
def widen(raw: Any, code: int, start: int, count: int, out: Any) -> None:
    """Write `count` entries of a row of bytes, from entry `start`, to `out` as float32."""
    # Slices before the loops: an index that is a plain loop variable needs no check, so that the
    # loop becomes vector code.
    if code == 1:
        words = raw.view(np.uint16)[start : start + count]
        bits = out.view(np.uint32)
        for i in range(count):
            bits[i] = np.uint32(words[i]) << np.uint32(16)
    elif code == 2:
        words = raw.view(np.uint16)[start : start + count]
        bits = out.view(np.uint32)
        for i in range(count):
            bits[i] = (np.uint32(words[i]) & np.uint32(0x7FFF)) << np.uint32(13)
        for i in range(count):
            # The exponent is 112 too small; the multiplication also normalises what is subnormal in
            # float16.
            out[i] = out[i] * np.float32(2.0**112)
        for i in range(count):
            word = np.uint32(words[i])
            special = (
                np.uint32(0x7F800000)
                if (word & np.uint32(0x7C00)) == np.uint32(0x7C00)
                else np.uint32(0)
            )
            bits[i] = bits[i] | special | ((word & np.uint32(0x8000)) << np.uint32(16))
    else:
        values = raw.view(np.float32)[start : start + count]
        for i in range(count):
            out[i] = values[i]


@compiled
def narrow(values: Any, code: int, count: int, raw: Any, start: int) -> None:
    """Write `count` float32 values to a row of bytes, from entry `start`, rounded to nearest even.

    Every NaN becomes the quiet NaN without sign or payload: which one an operation returns depends
    on the machine.
    """
    bits = values.view(np.uint32)
    if code == 1:
        words = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            word = np.uint32(bits[i])
            odd = (word >> np.uint32(16)) & np.uint32(1)
            rounded = np.uint32(word + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            words[i] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
    elif code == 2:
        words = raw.view(np.uint16)[start : start + count]
        for i in range(count):
            words[i] = _to_half(np.uint32(bits[i]))
    else:
        target = raw.view(np.uint32)[start : start + count]
        for i in range(count):
            word = np.uint32(bits[i])
            is_nan = (word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            target[i] = np.uint32(0x7FC00000) if is_nan else word


@compiled
def _to_half(word: Any) -> Any:
    """Return the float16 bits of float32 bits, rounded to nearest even."""
    sign = np.uint32((word >> np.uint32(16)) & np.uint32(0x8000))
    magnitude = np.uint32(word & np.uint32(0x7FFFFFFF))
    if magnitude > np.uint32(0x7F800000):
        return np.uint16(0x7E00)
    if magnitude >= np.uint32(0x477FF000):  # 65,520 and more round to infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if magnitude < np.uint32(0x38800000):  # below 2^-14: a multiple of 2^-24
        shift = np.uint32(126) - (magnitude >> np.uint32(23))
        if shift > np.uint32(24):
            return np.uint16(sign)
        mantissa = (magnitude & np.uint32(0x007FFFFF)) | np.uint32(0x00800000)
        kept = mantissa >> shift
        remainder = mantissa & ((np.uint32(1) << shift) - np.uint32(1))
        half = np.uint32(1) << (shift - np.uint32(1))
        if remainder > half or (remainder == half and (kept & np.uint32(1)) == np.uint32(1)):
            kept = kept + np.uint32(1)
        return np.uint16(sign | kept)
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    rounded = (magnitude - np.uint32(0x38000000) + np.uint32(0x0FFF) + odd) >> np.uint32(13)
    return np.uint16(sign | rounded)


@compiled
def sum_squares(values: Any, count: int, scratch: Any) -> Any:
    """Return the float64 sum of squares of the first `count` float32 values of a tile: NUM_LANES
    sums, then a fixed tree of them.

    `values` is a tile long, what is behind `count` in it is cleared; `scratch` is float64,
    NUM_LANES long at least.
    """
    for i in range(count, TILE_ENTRIES):
        values[i] = 0
    lanes = scratch[:NUM_LANES]
    for i in range(NUM_LANES):
        lanes[i] = 0
    for start in range(0, count, NUM_LANES):
        part = values[start : start + NUM_LANES]
        for i in range(NUM_LANES):
            value = np.float64(part[i])
            lanes[i] = lanes[i] + value * value
    half = NUM_LANES // 2
    while half > 0:
        upper = scratch[half : 2 * half]
        for i in range(half):
            scratch[i] = scratch[i] + upper[i]
        half = half // 2
    return scratch[0]


@compiled
def pack_bits(mask: Any, count: int, out: Any, start: int) -> None:
    """Write a tile of 0 and 1 (uint8) as bits, the first entry in the most significant bit, from
    byte `start` of `out`.

    Entries of `mask` behind `count`, up to a whole byte, are cleared.
    """
    for i in range(count, (count + 7) // 8 * 8):
        mask[i] = 0
    words = mask.view(np.uint64)
    packed = out[start : start + (count + 7) // 8]
    for i in range((count + 7) // 8):
        # Byte k of a word holds entry k; the product brings bit 0 of byte k to bit 63 − k.
        packed[i] = np.uint8((words[i] * np.uint64(0x8040201008040201)) >> np.uint64(56))


@compiled
def count_bits(words: Any) -> Any:
    """Return how many bits of uint64 words are set."""
    num_set = np.uint64(0)
    for i in range(len(words)):
        word = words[i]
        word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
        word = (word & np.uint64(0x3333333333333333)) + (
            (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
        )
        word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        num_set += (word * np.uint64(0x0101010101010101)) >> np.uint64(56)
    return np.int64(num_set)


@compiled
def add_squares(total: float, values: Any) -> float:
    """Return `total` plus the squares of float32 values that begin at a whole tile, added tile by
    tile with `sum_squares`.
    """
    scratch = np.empty(TILE_ENTRIES, np.float64)
    tile = np.empty(TILE_ENTRIES, np.float32)
    for start in range(0, len(values), TILE_ENTRIES):
        count = min(TILE_ENTRIES, len(values) - start)
        tile[:count] = values[start : start + count]
        total += sum_squares(tile, count, scratch)
    return total
