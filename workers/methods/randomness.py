"""Random numbers that depend on a place, never on a state: a counter-based generator keyed by seed,
expert and tensor.

The definition, for a kernel that must give the same bits:

    key   = the first 8 bytes, little-endian, of BLAKE3("SEED\\nEXPERT\\nTENSOR" in UTF-8, SEED in
    decimal) z     = key + (⌊position / 2⌋ + 1)·0x9E3779B97F4A7C15                 all arithmetic
    modulo 2⁶⁴ z     = (z XOR (z >> 30))·0xBF58476D1CE4E5B9 z     = (z XOR (z >>
    27))·0x94D049BB133111EB z     =  z XOR (z >> 31) h     = the lower 32 bits of z where position
    is even, else the upper 32 u     = (h >> 8)·2⁻²⁴
    a float32 in [0, 1), exact

`position` counts the entries of the whole tensor in C order; two entries share a z, since each
needs 24 of its bits. The mixing steps are those of SplitMix64 (Steele, Lea and Flood, 2014). An
entry with keep probability p (float32) is kept where u < p.
"""

from __future__ import annotations

import torch
from blake3 import blake3

_WEYL = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_ONE = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_TWO = 0x94D049BB133111EB - (1 << 64)


def stream_key(seed: int, *, expert: str, name: str) -> int:
    """Return the key of one tensor of one expert, as a signed 64-bit integer."""
    digest = blake3(f"{seed}\n{expert}\n{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def uniform(seed: int, *, expert: str, name: str, start: int, like: torch.Tensor) -> torch.Tensor:
    """Return float32 numbers in [0, 1) of the shape and on the device of `like`, whose first entry
    is at position `start`.
    """
    # int64 arithmetic wraps modulo 2^64; a logical shift is an arithmetic one without the sign's
    # copies.
    positions = torch.arange(start, start + like.numel(), dtype=torch.int64, device=like.device)
    mixed = ((positions >> 1) + 1) * _WEYL + stream_key(seed, expert=expert, name=name)
    mixed = (mixed ^ _shift(mixed, 30)) * _MIX_ONE
    mixed = (mixed ^ _shift(mixed, 27)) * _MIX_TWO
    mixed = mixed ^ _shift(mixed, 31)
    bits = (mixed >> (8 + 32 * (positions & 1))) & ((1 << 24) - 1)
    return (bits.to(torch.float32) * 2.0**-24).reshape(like.shape)


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)
