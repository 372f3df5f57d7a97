"""Stages of methods that have a compiled pass: the same counts as the method's own quantities give,
sooner.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.kernels.inner_products import NUM_COPIES, NUM_SUM_BINS, sum_products
from mmerge.workers.statistics.order_statistics import Counts

Vectors = Callable[[Any, int], tuple[int, bool]]
"""From the parameters and the number of experts: the first row that is a vector (0: the base), and
whether the base is taken off.
"""


def slerp_rows(_: Any, num_experts: int) -> tuple[int, bool]:
    """Return that two experts are the vectors, or the base and one expert."""
    return (1 if num_experts == 2 else 0), False


def _around_origin(parameters: Any, _: int) -> tuple[int, bool]:
    return 1, parameters.origin == "base"


VECTORS: Mapping[tuple[str, str], Vectors] = {
    ("slerp", "gram"): slerp_rows,
    ("nuslerp", "gram"): _around_origin,
    ("multislerp", "gram"): _around_origin,
    ("karcher", "gram"): lambda parameters, num_experts: (1, False),
    ("model_stock", "gram"): lambda parameters, num_experts: (1, True),
}
"""By method and stage, whose products are summed."""


def measure_gram(vectors: tuple[int, bool], blocks: Iterable[InputBlock]) -> dict[str, Counts]:
    """Return the counts of the products of every pair of vectors of a tensor, as `sums.count_sum`
    gives them.
    """
    first, from_base = vectors
    sums = np.zeros((0, NUM_COPIES * NUM_SUM_BINS), np.int64)
    names: list[str] = []
    for block in blocks:
        chosen = [0, *range(first, len(block.codes))]
        if not names:
            pairs = itertools.combinations_with_replacement(range(len(chosen) - 1), 2)
            names = [f"{one}.{other}" for one, other in pairs]
            sums = np.zeros((len(names), NUM_COPIES * NUM_SUM_BINS), np.int64)
        sum_products(
            block.addresses[chosen], block.codes[chosen], block.num_entries, from_base, sums
        )
    return dict(zip(names, sums.reshape(-1, NUM_COPIES, NUM_SUM_BINS).sum(axis=1), strict=True))
