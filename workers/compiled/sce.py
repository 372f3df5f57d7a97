"""The compiled path of SCE: passes over the tensor instead of the tensor in memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.compiled.interface import CompiledPass, PassRequest, ReadBlocks
from mmerge.workers.kernels.inner_products import NUM_COPIES
from mmerge.workers.kernels.locate import TIES
from mmerge.workers.kernels.sce import count_variances_within, merge_sce, sum_selected
from mmerge.workers.statistics.exact_sums import NUM_SUM_BINS, to_sum
from mmerge.workers.statistics.magnitude_histograms import (
    NUM_LOWER,
    Histogram,
    MagnitudeCounter,
    find_top,
    to_lower,
)


class ScePass(CompiledPass):
    """Select by variance, calculate weights, erase minority signs."""

    def __init__(self, request: PassRequest) -> None:
        self._num_experts, self._code = len(request.experts), request.code
        self._select_topk, self._scale = (
            request.parameters.select_topk,
            np.float32(request.parameters.scale),
        )
        self._threshold = np.float32(-1)
        self._ties = np.zeros(1, TIES)
        self._weights = (np.float32(0),) * self._num_experts

    @override
    def prepare(self, read_blocks: ReadBlocks) -> bool:
        if self._select_topk < 1 and not self._find_threshold(read_blocks):
            return False
        sums = np.zeros((self._num_experts, NUM_COPIES * NUM_SUM_BINS), np.int64)
        for block in read_blocks():
            sum_selected(
                block.addresses,
                block.codes,
                self._weights,
                block.num_entries,
                self._threshold,
                self._ties,
                sums,
            )
        self._ties["seen"] = 0
        totals = sums.reshape(-1, NUM_COPIES, NUM_SUM_BINS).sum(axis=1)
        # The square of a finite entry may overflow, and each copy counts every fourth entry.
        if totals[:, 255].any():
            return False
        squares = [to_sum(row) for row in totals]
        total = sum(squares)
        weights = [square / total if total else 1 / self._num_experts for square in squares]
        self._weights = tuple(np.float32(weight) for weight in weights)
        return True

    def _find_threshold(self, read_blocks: ReadBlocks) -> bool:
        counter = MagnitudeCounter(1)
        for block in read_blocks():
            counter.add_variances(block, self._weights)
        if not counter.is_finite():
            return False
        (histogram,) = counter.drain()
        bins, counts = histogram
        not_zero = int(counts.sum()) - (int(counts[0]) if len(bins) and bins[0] == 0 else 0)

        def refine(bin_number: int) -> Histogram:
            lower = np.zeros(NUM_LOWER, np.int64)
            for block in read_blocks():
                count_variances_within(
                    block.addresses,
                    block.codes,
                    self._weights,
                    block.num_entries,
                    bin_number // 2,
                    lower,
                )
            return to_lower(lower)

        threshold, num_ties = find_top(histogram, int(not_zero * self._select_topk), refine=refine)
        self._threshold = np.float32(threshold)
        self._ties["belonging"] = num_ties
        return True

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_sce(
            block.addresses,
            block.codes,
            block.num_entries,
            self._threshold,
            self._ties,
            self._weights,
            self._scale,
            self._code,
            out,
        )
