"""Which methods have a compiled path, by name. The method files remain the definition; a path gives
the same bytes, sooner.

A path that does not fit its parameters is not taken: the block then goes through the method's
`merge_block`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.compiled.inner_products import slerp_rows
from mmerge.workers.compiled.interface import FastPath, MaskPath, PathRequest
from mmerge.workers.compiled.locate_then_merge import (
    HOW,
    RowPath,
    keep_all,
    make_breadcrumbs,
    make_dare,
    make_ties,
)
from mmerge.workers.compiled.sce import ScePath
from mmerge.workers.kernels.linear import merge_linear, merge_mean
from mmerge.workers.kernels.mmer import merge_mmer
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.methods.sphere import slerp_pair


class MmerPath(MaskPath):
    """MMER with any reduction."""

    def __init__(self, request: PathRequest) -> None:
        super().__init__(len(request.experts))
        parameters = request.parameters
        scales = [
            parameters.mask_scale if expert.mask_scale is None else expert.mask_scale
            for expert in request.experts
        ]
        self._half_scales = np.array([scale * 0.5 for scale in scales], np.float32)
        self._thresholds = np.array(request.thresholds, np.float32)
        self._how, self._code = HOW[parameters.reduction], request.code

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_mmer(
            block.addresses, block.codes, block.num_entries, self._thresholds, self._how, self._half_scales, self._code, out, masks,
            block.start // 8, self.counts, self.overlaps, self.squares,
        )  # fmt: skip


class LinearPath(FastPath):
    """Linear merge, normalised or not."""

    def __init__(self, request: PathRequest) -> None:
        self._weights, self._code = np.array(request.weights, np.float32), request.code
        self._divisor = np.float32(sum(request.weights) if request.parameters.normalize else 0)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_linear(
            block.addresses,
            block.codes,
            block.num_entries,
            self._weights,
            self._divisor,
            self._code,
            out,
        )


class NaiveMcPath(FastPath):
    """The mean of the task vectors."""

    def __init__(self, request: PathRequest) -> None:
        self._code = request.code

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_mean(block.addresses, block.codes, block.num_entries, self._code, out)


class SlerpPath(FastPath):
    """Two coefficients that follow from the tensor's inner products."""

    def __init__(self, request: PathRequest) -> None:
        self._code = request.code
        self._weights = np.array(slerp_pair(request.known, t=request.parameters.t), np.float32)
        first, _ = slerp_rows(request.parameters, len(request.experts))
        self._chosen = [0, first, first + 1]

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        addresses, codes = block.addresses[self._chosen], block.codes[self._chosen]
        merge_linear(
            addresses, codes, block.num_entries, self._weights, np.float32(0), self._code, out
        )


def _make_linear(request: PathRequest) -> FastPath | None:
    # Where the weights cancel, the reference divides by zero; a divisor of 0 means no division to
    # the kernel.
    if request.parameters.normalize and np.float32(sum(request.weights)) == 0:
        return None
    return LinearPath(request)


FAST_PATHS: Mapping[str, Callable[[PathRequest], FastPath | None]] = {
    "mmer": MmerPath,
    "linear": _make_linear,
    "naive_mc": NaiveMcPath,
    "slerp": SlerpPath,
    "task_arithmetic": keep_all,
    "ties": make_ties,
    "dare_linear": make_dare,
    "dare_ties": make_dare,
    "breadcrumbs": make_breadcrumbs,
    "breadcrumbs_ties": make_breadcrumbs,
    "della": RowPath,
    "della_linear": RowPath,
    "sce": ScePath,
}
"""By a method's name, what makes its path for one tensor; None where the method's own code must be
used.
"""


def find_fast_path(method: str, request: PathRequest) -> FastPath | None:
    """Return the compiled path of a method for one tensor, None where there is none."""
    make = FAST_PATHS.get(method)
    return make(request) if make is not None and request.dtype in CODES else None
