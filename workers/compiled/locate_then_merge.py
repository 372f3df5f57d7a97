"""Compiled paths of the methods that locate and then merge: task arithmetic, TIES, DARE, DELLA,
Breadcrumbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.compiled.interface import FastPath, PathRequest, ReadBlocks
from mmerge.workers.kernels.della import merge_by_row
from mmerge.workers.kernels.locate import (
    DROP,
    ELECT_MAX,
    ELECT_MEAN,
    ELECT_SUM,
    KEEP_ALL,
    SUM,
    TOP,
    TRIM,
    merge_located,
)
from mmerge.workers.methods.dare import densities
from mmerge.workers.methods.interface import num_columns
from mmerge.workers.methods.randomness import stream_key
from mmerge.workers.statistics.magnitude_histograms import (
    Histogram,
    MagnitudeCounter,
    count_lower,
    find_top,
)

HOW: Mapping[str, int] = {"mean": ELECT_MEAN, "sum": ELECT_SUM, "max": ELECT_MAX}


class _Merging:
    """How located task vectors are put together: by sum, or by election where the parameters have a
    reduction.
    """

    def __init__(self, request: PathRequest) -> None:
        parameters, weights = request.parameters, request.weights
        self.weights, self.scale, self.code = (
            np.array(weights, np.float32),
            np.float32(parameters.scale),
            request.code,
        )
        reduction = getattr(parameters, "reduction", None)
        self.how = SUM if reduction is None else HOW[reduction]
        self.zero_sign = np.float32(_zero_sign(request) if reduction is not None else 0)
        divides = reduction is None and parameters.normalize and sum(weights)
        self.divisor = np.float32(sum(weights) if divides else 1)


def _zero_sign(request: PathRequest) -> float:
    rule = request.parameters.zero_sign
    if rule != "majority":
        return 1.0 if rule == "positive" else 0.0
    total = request.known["sign"][0]
    return float(total > 0) - float(total < 0)


class LocatedPath(FastPath):
    """Locates entry by entry: all, by threshold, at random, or by exact counts of largest
    magnitudes.
    """

    def __init__(
        self, request: PathRequest, kinds: Sequence[int], numbers: Sequence[Sequence[float]]
    ) -> None:
        self._merging, self._start = _Merging(request), request.tensor.start
        num_experts = len(request.experts)
        self._kinds, self._numbers = (
            np.array(kinds, np.int64),
            np.zeros((num_experts, 3), np.float32),
        )
        with np.errstate(over="ignore"):  # torch casts a factor beyond float32 to Inf as well
            for row, found in zip(self._numbers, numbers, strict=True):
                row[: len(found)] = found
        self._keys = np.zeros(num_experts, np.uint64)
        self._ties = np.zeros((num_experts, 2, 2), np.int64)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        how = self._merging
        merge_located(
            block.addresses, block.codes, block.num_entries, np.uint64(self._start + block.start), self._kinds, self._numbers, self._keys,
            self._ties, how.weights, how.how, how.zero_sign, how.divisor, how.scale, how.code, out,
        )  # fmt: skip


class DropPath(LocatedPath):
    """Drops at random with one probability per expert (DARE)."""

    def __init__(self, request: PathRequest) -> None:
        kept = densities(request.parameters, request.experts)
        divisors = kept if request.parameters.rescale == "probability" else [1.0] * len(kept)
        numbers = list(zip(kept, divisors, _norm_factors(request), strict=True))
        super().__init__(request, [DROP] * len(kept), numbers)
        self._keys[:] = _stream_keys(request)


class TopPath(LocatedPath):
    """Keeps what lies between two exact counts of largest magnitudes; ties by position
    (Breadcrumbs, exact TIES).
    """

    def __init__(self, request: PathRequest, counts: Sequence[tuple[int, int] | None]) -> None:
        """Make the path. `counts`: per expert the larger and the smaller count, None to keep
        everything.
        """
        super().__init__(
            request, [KEEP_ALL if pair is None else TOP for pair in counts], [()] * len(counts)
        )
        self._counts = counts

    @override
    def prepare(self, read_blocks: ReadBlocks) -> bool:
        if all(pair is None for pair in self._counts):
            return True
        counter = MagnitudeCounter(len(self._counts))
        for block in read_blocks():
            counter.add(block)
        if not counter.is_finite():
            return False
        self._ties[:, :, 1] = 0
        for index, (histogram, pair) in enumerate(zip(counter.drain(), self._counts, strict=True)):
            if pair is None:
                continue

            def refine(bin_number: int, index: int = index) -> Histogram:
                return count_lower(
                    (block.of_expert(index) for block in read_blocks()), bin_number=bin_number
                )

            for which, count in enumerate(pair):
                self._numbers[index, which], self._ties[index, which, 0] = find_top(
                    histogram, count, refine=refine
                )
        return True


class RowPath(FastPath):
    """Drops at random, with probabilities by rank within the row (DELLA)."""

    by_row = True

    def __init__(self, request: PathRequest) -> None:
        parameters = request.parameters
        self._merging, self._start = _Merging(request), request.tensor.start
        self._columns = num_columns(request.tensor.base.spec.shape)
        kept, epsilon = densities(parameters, request.experts), parameters.epsilon
        divides = parameters.rescale == "probability"
        factors = [
            1.0 if density == 1 else factor
            for density, factor in zip(kept, _norm_factors(request), strict=True)
        ]
        self._drops = np.array([density != 1 for density in kept], np.int64)
        numbers = [
            (density - epsilon, 2 * epsilon, divides, factor, density)
            for density, factor in zip(kept, factors, strict=True)
        ]
        with np.errstate(over="ignore"):  # torch casts a factor beyond float32 to Inf as well
            self._numbers = np.array(numbers, np.float32)
        self._keys = np.array(_stream_keys(request), np.uint64)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        how = self._merging
        merge_by_row(
            block.addresses, block.codes, block.num_entries, np.uint64(self._start + block.start), self._columns, self._drops, self._numbers,
            self._keys, how.weights, how.how, how.zero_sign, how.divisor, how.scale, how.code, out,
        )  # fmt: skip


def _stream_keys(request: PathRequest) -> list[int]:
    seed, name = request.parameters.seed, request.tensor.name
    return [
        stream_key(seed, expert=expert, name=name) % (1 << 64) for expert in request.expert_names
    ]


def _norm_factors(request: PathRequest) -> list[float]:
    """Return the factors that restore each task vector's L1 norm, 1 where the recipe does not ask
    for that.
    """
    factors = []
    for index in range(len(request.experts)):
        before, after = 1.0, 1.0
        if request.parameters.rescale == "norm":
            before, after = request.known[f"before.{index}"][0], request.known[f"after.{index}"][0]
        factors.append(before / after if before and after else 1.0)
    return factors


def keep_all(request: PathRequest) -> FastPath:
    """Return the path of task arithmetic."""
    return LocatedPath(request, [KEEP_ALL] * len(request.experts), [()] * len(request.experts))


def make_ties(request: PathRequest) -> FastPath:
    """Return the path of TIES, by threshold or by exact count."""
    if request.parameters.count == "threshold":
        return LocatedPath(
            request,
            [TRIM] * len(request.experts),
            [(threshold,) for threshold in request.thresholds],
        )
    kept = densities(request.parameters, request.experts)
    return TopPath(request, [(int(density * request.tensor.num_entries), 0) for density in kept])


def make_dare(request: PathRequest) -> FastPath:
    """Return the path of DARE."""
    return DropPath(request)


def make_breadcrumbs(request: PathRequest) -> FastPath:
    """Return the path of Breadcrumbs."""
    num_entries = request.tensor.num_entries
    counts: list[tuple[int, int] | None] = []
    for density, expert in zip(
        densities(request.parameters, request.experts), request.experts, strict=True
    ):
        gamma = request.parameters.gamma if expert.gamma is None else expert.gamma
        kept = int(density * num_entries)
        top = min(int(gamma * num_entries), num_entries - kept)
        counts.append(None if density == 1 else (top + kept, top))
    return TopPath(request, counts)
