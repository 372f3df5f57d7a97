"""The compiled pass of stages that sum products of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.kernels.inner_products import NUM_COPIES, NUM_SUM_BINS, sum_products
from mmerge.workers.methods.interface import ProductVectors
from mmerge.workers.statistics.order_statistics import Counts


def sum_vector_products(vectors: ProductVectors, blocks: Iterable[InputBlock]) -> dict[str, Counts]:
    """Return the counts of the products of every pair of vectors of a tensor, as
    `exact_sums.count_sum` counts the quantities of the method's own code.
    """
    sums = np.zeros((0, NUM_COPIES * NUM_SUM_BINS), np.int64)
    names: list[str] = []
    for block in blocks:
        rows = [0, *range(vectors.first, len(block.codes))]
        if not names:
            pairs = itertools.combinations_with_replacement(range(len(rows) - 1), 2)
            names = [f"{row}.{column}" for row, column in pairs]
            sums = np.zeros((len(names), NUM_COPIES * NUM_SUM_BINS), np.int64)
        addresses, codes = block.addresses[rows], block.codes[rows]
        sum_products(addresses, codes, block.num_entries, vectors.from_base, sums)
    counts = sums.reshape(-1, NUM_COPIES, NUM_SUM_BINS).sum(axis=1)
    return dict(zip(names, counts, strict=True))
