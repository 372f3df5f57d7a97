"""Statistics of one tensor of a masks build: counts, overlaps of masks, and norms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch

from mmerge.manifests.format.entry import TensorStatistics
from mmerge.workers.kernels.masks import MaskStatistics
from mmerge.workers.kernels.tiles import TILE_ENTRIES, add_squares
from mmerge.workers.methods.interface import Block, MergedBlock


class MaskTally:
    """Adds up the statistics of one tensor block by block, or takes those of a compiled pass."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._kept = [0] * num_experts
        self._agreeing = [0] * num_experts
        self._masked = [0] * num_experts
        self._consensus = [0] * (num_experts + 1)
        self._overlaps = [0] * (num_experts * (num_experts - 1) // 2)
        self._squares = [SquareSum() for _ in range(num_experts + 1)]
        """Of the task vectors, then of the stored values."""

    def take(self, statistics: MaskStatistics) -> None:
        """Take over the statistics that a compiled pass added up."""
        self._kept = statistics.kept.tolist()
        self._agreeing = statistics.agreeing.tolist()
        self._masked = statistics.masked.tolist()
        self._consensus = statistics.consensus.tolist()
        self._overlaps = statistics.overlaps.tolist()
        self._squares = [SquareSum(total) for total in statistics.squares.tolist()]

    def add(self, block: Block, merged: MergedBlock) -> None:
        """Add a block that the method's own code merged."""
        for index, delta in enumerate(block.task_vectors()):
            self._squares[index].add(delta)
        self._squares[-1].add(merged.values.to(torch.float32))
        for index, trimmed in enumerate(merged.trimmed):
            self._kept[index] += int(trimmed.count_nonzero())
            if merged.sign is not None:
                agrees = (trimmed.sign() == merged.sign) & (merged.sign != 0)
                self._agreeing[index] += int(agrees.count_nonzero())
        if merged.masks:
            self._add_masks([mask.reshape(-1) for mask in merged.masks])

    def _add_masks(self, masks: list[torch.Tensor]) -> None:
        votes = torch.stack(masks).sum(dim=0)
        counts = torch.bincount(votes, minlength=self._num_experts + 1).tolist()
        for num_experts, count in enumerate(counts):
            self._consensus[num_experts] += count
        for index, mask in enumerate(masks):
            self._masked[index] += int(mask.count_nonzero())
        for index, (first, second) in enumerate(itertools.combinations(masks, 2)):
            self._overlaps[index] += int((first & second).count_nonzero())

    def of_values(self, num_entries: int) -> TensorStatistics:
        """Return the statistics of the stored values."""
        return TensorStatistics(
            num_entries=num_entries,
            delta_norm=_to_norm(self._squares[-1].total()),
            consensus=tuple(self._consensus),
            overlaps=tuple(self._overlaps),
        )

    def of_expert(self, index: int, num_entries: int) -> TensorStatistics:
        """Return the statistics of the mask of an expert."""
        return TensorStatistics(
            num_entries=num_entries,
            num_kept=self._kept[index],
            num_agreeing=self._agreeing[index],
            num_masked=self._masked[index],
            task_vector_norm=_to_norm(self._squares[index].total()),
        )


class SquareSum:
    """Sums x² over a tensor in tiles of fixed size, independent of the blocks.

    Entries of an incomplete tile are kept for the next block, so that the bits do not depend on the
    block size.
    """

    def __init__(self, total: float = 0.0) -> None:
        self._total = total
        self._waiting = np.empty(0, dtype=np.float32)

    def add(self, values: torch.Tensor) -> None:
        """Add the squares of a block."""
        flat = values.reshape(-1).cpu().numpy()
        if len(self._waiting):
            flat = np.concatenate([self._waiting, flat])
        whole = len(flat) - len(flat) % TILE_ENTRIES
        self._total = add_squares(self._total, flat[:whole])
        self._waiting = flat[whole:].copy()

    def total(self) -> float:
        """Return the sum over all blocks so far."""
        return add_squares(self._total, self._waiting)


def _to_norm(squares: float) -> float | None:
    if not math.isfinite(squares):
        return None  # JSON has no NaN: a tensor with kept NaN or Inf has no norm
    # float32 keeps the bits that every machine computes alike: the last bits of a float64 sum
    # depend on its SIMD width.
    return float(np.float32(math.sqrt(squares)))
