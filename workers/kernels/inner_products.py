"""Exact sums of products of rows, compiled: what the slerp family needs to know of a tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmerge.workers.kernels.tiles import (
    TILE_ENTRIES,
    compiled,
    select,
    subtract_at,
    to_bits,
    widen_at,
)

NUM_SUM_BINS = 512
NUM_COPIES = 4
"""Tables that take turns: products near each other have the same exponent, and an addition must
wait for the one before it.
"""


@compiled
def sum_products(inputs: Any, codes: Any, num_entries: int, from_base: bool, sums: Any) -> None:
    """Add the entrywise products of every pair of rows, each with itself too, to `sums`, per sign
    and exponent.

    Args:
        inputs: int64, where the rows of bytes begin: the vectors, behind the base.
        from_base: whether the vectors are what the rows differ by from the base.
        sums: int64 (pairs, NUM_COPIES * NUM_SUM_BINS): integer significands, see
            workers/statistics/exact_sums.py. Pairs in the order 0.0, 0.1, …, 1.1, …
    """
    num_vectors = inputs.shape[0] - 1
    vectors = np.empty((num_vectors, TILE_ENTRIES), np.float32)
    base = np.empty(TILE_ENTRIES, np.float32)
    places = np.empty(TILE_ENTRIES, np.uint32)
    significands = np.empty(TILE_ENTRIES, np.uint32)
    for start in range(0, num_entries, TILE_ENTRIES):
        count = min(TILE_ENTRIES, num_entries - start)
        if from_base:
            widen_at(inputs[0], codes[0], start, count, base)
        for index in range(num_vectors):
            vector = vectors[index]
            if from_base:
                subtract_at(inputs[index + 1], codes[index + 1], start, count, base, vector)
            else:
                widen_at(inputs[index + 1], codes[index + 1], start, count, vector)
        pair = 0
        for index in range(num_vectors):
            vector = vectors[index]
            for partner in range(index, num_vectors):
                partner_vector, total = vectors[partner], sums[pair]
                for i in range(count):
                    word = np.uint32(to_bits(vector[i] * partner_vector[i]))
                    normal = select(
                        (word & np.uint32(0x7F800000)) != 0, np.uint32(1 << 23), np.uint32(0)
                    )
                    significands[i] = np.uint32(np.uint32(word & np.uint32(0x7FFFFF)) | normal)
                    places[i] = np.uint32(
                        np.uint32(np.uint32(i & 3) << np.uint32(9))
                        | np.uint32(word >> np.uint32(23))
                    )
                for i in range(count):
                    total[places[i]] += np.int64(significands[i])
                pair += 1
