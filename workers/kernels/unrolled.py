"""Sums over the experts at one entry, unrolled for the number of experts at hand.

A loop over entries becomes vector code only if its body is straight-line code. A body that loops
over experts is not: LLVM then handles one entry at a time (measured with 3 experts: 11.3 µs per
tile, against 3.0 µs for one pass over the tile per expert and 1.0 µs for these functions). So the
rows of a tile are a tuple, whose length is part of its type, and each function calls itself with
the tuple shortened by one until one row is left. Numba compiles one variant of a kernel per number
of experts, all with the same source.

The recursion goes down from the last row, so sums are taken from the first expert to the last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from mmerge.workers.kernels.tiles import select, turn_sign


def cut_rows(matrix: Any, weights: Any, start: int, count: int) -> Any:
    """Return rows of a matrix from entry `start` as a tuple, one row per element of `weights`."""


@overload(cut_rows, strict=False)  # type: ignore[untyped-decorator]
def _cut_rows(matrix: Any, weights: Any, start: int, count: int) -> Any:
    if len(weights) == 1:
        return lambda matrix, weights, start, count: (matrix[0][start : start + count],)

    def cut(matrix: Any, weights: Any, start: int, count: int) -> Any:
        last = len(weights) - 1
        row = matrix[last][start : start + count]
        return (*cut_rows(matrix, weights[:-1], start, count), row)

    return cut


def sum_rows(rows: Any, i: int) -> Any:
    """Return the sum of entry `i` over all rows."""


@overload(sum_rows, strict=False)  # type: ignore[untyped-decorator]
def _sum_rows(rows: Any, i: int) -> Any:
    if len(rows) == 1:
        return lambda rows, i: rows[0][i]
    return lambda rows, i: sum_rows(rows[:-1], i) + rows[-1][i]


def sum_agreeing(rows: Any, i: int, elected: Any, limit: Any) -> Any:
    """Return the sum of entry `i` over the rows that agree with the elected sign.

    A row agrees where its value, with the sign turned by that of `elected`, is above `limit`: 0,
    or infinity where nothing is elected, so that nobody agrees.
    """


@overload(sum_agreeing, strict=False)  # type: ignore[untyped-decorator]
def _sum_agreeing(rows: Any, i: int, elected: Any, limit: Any) -> Any:
    def last(rows: Any, i: int, elected: Any, limit: Any) -> Any:
        value = rows[-1][i]
        return select(turn_sign(value, elected) > limit, value, np.float32(0))

    def all_rows(rows: Any, i: int, elected: Any, limit: Any) -> Any:
        value = rows[-1][i]
        agreeing = select(turn_sign(value, elected) > limit, value, np.float32(0))
        return sum_agreeing(rows[:-1], i, elected, limit) + agreeing

    return last if len(rows) == 1 else all_rows


def largest_agreeing(rows: Any, i: int, elected: Any, limit: Any) -> Any:
    """Return the largest magnitude of entry `i` among the rows that agree, see `sum_agreeing`."""


@overload(largest_agreeing, strict=False)  # type: ignore[untyped-decorator]
def _largest_agreeing(rows: Any, i: int, elected: Any, limit: Any) -> Any:
    def last(rows: Any, i: int, elected: Any, limit: Any) -> Any:
        value = rows[-1][i]
        return select(turn_sign(value, elected) > limit, abs(value), np.float32(0))

    def all_rows(rows: Any, i: int, elected: Any, limit: Any) -> Any:
        value = rows[-1][i]
        magnitude = select(turn_sign(value, elected) > limit, abs(value), np.float32(0))
        largest = largest_agreeing(rows[:-1], i, elected, limit)
        return select(magnitude > largest, magnitude, largest)

    return last if len(rows) == 1 else all_rows


def sum_agreeing_weights(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
    """Return the sum of the weights of the rows that agree at entry `i`, see `sum_agreeing`."""


@overload(sum_agreeing_weights, strict=False)  # type: ignore[untyped-decorator]
def _sum_agreeing_weights(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
    def last(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
        return select(turn_sign(rows[-1][i], elected) > limit, weights[-1], np.float32(0))

    def all_rows(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
        weight = select(turn_sign(rows[-1][i], elected) > limit, weights[-1], np.float32(0))
        return sum_agreeing_weights(rows[:-1], weights[:-1], i, elected, limit) + weight

    return last if len(rows) == 1 else all_rows


def add_agreeing(counts: Any, rows: Any, i: int, elected: Any, limit: Any) -> Any:
    """Return `counts` (int32 per row), one more for each row that agrees, see `sum_agreeing`."""


@overload(add_agreeing, strict=False)  # type: ignore[untyped-decorator]
def _add_agreeing(counts: Any, rows: Any, i: int, elected: Any, limit: Any) -> Any:
    def last(counts: Any, rows: Any, i: int, elected: Any, limit: Any) -> Any:
        return (np.int32(counts[-1] + np.int32(turn_sign(rows[-1][i], elected) > limit)),)

    def all_rows(counts: Any, rows: Any, i: int, elected: Any, limit: Any) -> Any:
        count = np.int32(counts[-1] + np.int32(turn_sign(rows[-1][i], elected) > limit))
        return (*add_agreeing(counts[:-1], rows[:-1], i, elected, limit), count)

    return last if len(rows) == 1 else all_rows


def zero_counts(weights: Any) -> Any:
    """Return a tuple of int32 zeros, one per element of `weights`."""


@overload(zero_counts, strict=False)  # type: ignore[untyped-decorator]
def _zero_counts(weights: Any) -> Any:
    if len(weights) == 1:
        return lambda weights: (np.int32(0),)
    return lambda weights: (*zero_counts(weights[:-1]), np.int32(0))


def sum_squared_distances(rows: Any, i: int, mean: Any) -> Any:
    """Return the sum over all rows of the squared distance of entry `i` from `mean`."""


@overload(sum_squared_distances, strict=False)  # type: ignore[untyped-decorator]
def _sum_squared_distances(rows: Any, i: int, mean: Any) -> Any:
    def last(rows: Any, i: int, mean: Any) -> Any:
        distance = rows[-1][i] - mean
        return distance * distance

    def all_rows(rows: Any, i: int, mean: Any) -> Any:
        distance = rows[-1][i] - mean
        return sum_squared_distances(rows[:-1], i, mean) + distance * distance

    return last if len(rows) == 1 else all_rows


def sum_selected_rows(rows: Any, i: int, is_selected: Any) -> Any:
    """Return the sum of entry `i` over all rows, of zeros where the entry is not selected."""


@overload(sum_selected_rows, strict=False)  # type: ignore[untyped-decorator]
def _sum_selected_rows(rows: Any, i: int, is_selected: Any) -> Any:
    def last(rows: Any, i: int, is_selected: Any) -> Any:
        return select(is_selected, rows[-1][i], np.float32(0))

    def all_rows(rows: Any, i: int, is_selected: Any) -> Any:
        value = select(is_selected, rows[-1][i], np.float32(0))
        return sum_selected_rows(rows[:-1], i, is_selected) + value

    return last if len(rows) == 1 else all_rows


def sum_weighted_agreeing(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
    """Return the sum of weight times entry `i` over the rows that agree, see `sum_agreeing`."""


@overload(sum_weighted_agreeing, strict=False)  # type: ignore[untyped-decorator]
def _sum_weighted_agreeing(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
    def last(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
        value = rows[-1][i]
        # Added to 0, since a weight of 0 makes −0 of a negative value.
        agreeing = select(turn_sign(value, elected) > limit, weights[-1] * value, np.float32(0))
        return np.float32(0) + agreeing

    def all_rows(rows: Any, weights: Any, i: int, elected: Any, limit: Any) -> Any:
        value = rows[-1][i]
        agreeing = select(turn_sign(value, elected) > limit, weights[-1] * value, np.float32(0))
        return sum_weighted_agreeing(rows[:-1], weights[:-1], i, elected, limit) + agreeing

    return last if len(rows) == 1 else all_rows
