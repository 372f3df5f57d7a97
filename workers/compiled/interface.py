"""What a compiled path of a method is: an object per tensor that merges its blocks as the method's
own code would, sooner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.methods.interface import Known
from mmerge.workers.task import TensorTask

ReadBlocks = Callable[[], Iterator[InputBlock]]
"""Begins a pass over the tensor."""


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

    @property
    def weights(self) -> list[float]:
        """The weight of each expert."""
        return [expert.weight for expert in self.experts]


class FastPath(ABC):
    """Merges the blocks of one tensor, in their order."""

    by_row = False
    """Whether a block must hold whole rows."""

    def prepare(self, read_blocks: ReadBlocks) -> bool:
        """Look at the whole tensor beforehand, where the method needs that; False where its own
        code must be used after all.
        """
        return True

    @abstractmethod
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        """Write the merged values of a block to `out` (bytes), and bits to `masks`, which has a row
        per expert for the whole tensor.
        """


class MaskPath(FastPath):
    """A path of a masks build: it counts as it goes."""

    def __init__(self, num_experts: int) -> None:
        self.counts = np.zeros((4, num_experts + 1), np.int64)
        """Rows kept, agreeing, masked (per expert), consensus (per number of experts that want an
        entry).
        """
        self.overlaps = np.zeros(num_experts * (num_experts - 1) // 2, np.int64)
        self.squares = np.zeros(num_experts + 1, np.float64)
