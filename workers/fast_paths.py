"""Which methods have a compiled path, by name. The method files remain the definition; a path gives the same bytes, sooner.

A path that does not fit its parameters is not taken: the block then goes through the method's `merge_block`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.workers.inputs import InputBlock
from mmerge.workers.kernels import CODES
from mmerge.workers.kernels_linear import merge_linear, merge_mean, merge_task_vectors
from mmerge.workers.kernels_ties import merge_mmer, merge_ties
from mmerge.workers.methods.interface import Known
from mmerge.workers.task import TensorTask


@dataclass(frozen=True)
class PathRequest:
    """The numbers that hold for one tensor."""

    parameters: Any
    experts: Sequence[Any]
    thresholds: Sequence[float]
    known: Known
    tensor: TensorTask
    expert_names: tuple[str, ...]
    dtype: str
    """Safetensors name of the dtype that is written."""

    @property
    def code(self) -> int:
        """The dtype that is written, as kernels name it."""
        return CODES[self.dtype]


class FastPath(ABC):
    """Merges the blocks of one tensor."""

    @abstractmethod
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        """Write the merged values of a block to `out` (bytes), and bits to `masks`, which has a row per expert for the whole tensor."""


class MaskPath(FastPath):
    """A path of a masks build: it counts as it goes."""

    def __init__(self, num_experts: int) -> None:
        self.counts = np.zeros((4, num_experts + 1), np.int64)
        """Rows kept, agreeing, masked (per expert), consensus (per number of experts that want an entry)."""
        self.overlaps = np.zeros(num_experts * (num_experts - 1) // 2, np.int64)
        self.squares = np.zeros(num_experts + 1, np.float64)


class MmerPath(MaskPath):
    """MMER with any reduction."""

    def __init__(self, request: PathRequest) -> None:
        super().__init__(len(request.experts))
        parameters = request.parameters
        scales = [parameters.mask_scale if expert.mask_scale is None else expert.mask_scale for expert in request.experts]
        self._half_scales = np.array([scale * 0.5 for scale in scales], np.float32)
        self._thresholds = np.array(request.thresholds, np.float32)
        self._is_mean, self._code = parameters.reduction == "mean", request.code

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_mmer(
            block.rows, block.codes, block.num_entries, self._thresholds, self._is_mean, self._half_scales, self._code, out, masks,
            block.start // 8, self.counts, self.overlaps, self.squares,
        )  # fmt: skip


class TiesPath(FastPath):
    """TIES with reduction mean or sum."""

    def __init__(self, request: PathRequest) -> None:
        self._thresholds = np.array(request.thresholds, np.float32)
        self._scale, self._code = np.float32(request.parameters.scale), request.code
        self._is_mean = request.parameters.reduction == "mean"

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_ties(block.rows, block.codes, block.num_entries, self._thresholds, self._is_mean, self._scale, self._code, out)


class LinearPath(FastPath):
    """Linear merge, normalised or not."""

    def __init__(self, request: PathRequest) -> None:
        weights = [expert.weight for expert in request.experts]
        self._weights, self._code = np.array(weights, np.float32), request.code
        self._divisor = np.float32(sum(weights) if request.parameters.normalize else 0)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_linear(block.rows, block.codes, block.num_entries, self._weights, self._divisor, self._code, out)


class TaskArithmeticPath(FastPath):
    """Task arithmetic."""

    def __init__(self, request: PathRequest) -> None:
        self._weights, self._code = np.array([expert.weight for expert in request.experts], np.float32), request.code
        self._scale = np.float32(request.parameters.scale)

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_task_vectors(block.rows, block.codes, block.num_entries, self._weights, self._scale, self._code, out)


class NaiveMcPath(FastPath):
    """The mean of the task vectors."""

    def __init__(self, request: PathRequest) -> None:
        self._code = request.code

    @override
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        merge_mean(block.rows, block.codes, block.num_entries, self._code, out)


def _linear(request: PathRequest) -> FastPath | None:
    # Where the weights cancel, the reference divides by zero; a divisor of 0 means no division to the kernel.
    if request.parameters.normalize and np.float32(sum(expert.weight for expert in request.experts)) == 0:
        return None
    return LinearPath(request)


FAST_PATHS: Mapping[str, Callable[[PathRequest], FastPath | None]] = {
    "mmer": MmerPath,
    "ties": TiesPath,
    "linear": _linear,
    "task_arithmetic": TaskArithmeticPath,
    "naive_mc": NaiveMcPath,
}
"""By a method's name, what makes its path for one tensor; None where the method's own code must be used."""


def find_fast_path(method: str, request: PathRequest) -> FastPath | None:
    """Return the compiled path of a method for one tensor, None where there is none."""
    make = FAST_PATHS.get(method)
    return make(request) if make is not None and request.dtype in CODES else None
