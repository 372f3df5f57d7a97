"""Compiled passes of weighted sums of weights: linear merge, NaiveMC, slerp."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.compiled.interface import CompiledPass, PassRequest
from mmerge.workers.kernels.linear import merge_linear, merge_mean
from mmerge.workers.methods.slerp import first_vector
from mmerge.workers.methods.sphere import slerp_pair


class LinearPass(CompiledPass):
    """Σ wᵢθᵢ of some of the inputs, divided by a divisor that is not 0."""

    def __init__(
        self, rows: Sequence[int], weights: Sequence[float], *, divisor: float, code: int
    ) -> None:
        """Make the pass. `rows`: which inputs are summed, 0 for the base."""
        self._rows = [0, *rows]
        self._weights = np.array(weights, np.float32)
        self._divisor = np.float32(divisor)
        self._code = code

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        addresses, codes = block.addresses[self._rows], block.codes[self._rows]
        merge_linear(
            addresses, codes, block.num_entries, self._weights, self._divisor, self._code, out
        )


class MeanPass(CompiledPass):
    """The mean of the task vectors."""

    def __init__(self, request: PassRequest) -> None:
        self._code = request.code

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_mean(block.addresses, block.codes, block.num_entries, self._code, out)


def make_linear_pass(request: PassRequest) -> CompiledPass | None:
    """Return the pass of the linear merge."""
    rows = range(1, len(request.experts) + 1)
    divisor = float(sum(request.weights)) if request.parameters.normalize else 0.0
    if request.parameters.normalize and np.float32(divisor) == 0:
        # The reference divides by zero; a divisor of 0 stands for no division to the kernel.
        return None
    return LinearPass(rows, request.weights, divisor=divisor, code=request.code)


def make_slerp_pass(request: PassRequest) -> CompiledPass:
    """Return the pass of slerp: two coefficients that follow from the tensor's inner products."""
    first = first_vector(len(request.experts))
    coefficients = slerp_pair(request.tensor.measured, t=request.parameters.t)
    return LinearPass([first, first + 1], coefficients, divisor=0.0, code=request.code)
