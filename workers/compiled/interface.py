"""The interface of compiled passes: one object per tensor that merges its blocks.

A pass writes the same bytes as the method's own code, faster.

Calls, by the merge task (workers/tasks/merge.py), for each tensor:

1. `find_compiled_pass` imports the function that the method names in `compiled_pass` and calls it
   with a PassRequest. None means that the method's own code is used: the parameters, the dtype or
   the number of experts do not fit.
2. `CompiledPass.prepare`, which may read the whole tensor. False means the same: a value is not
   finite, say.
3. `CompiledPass.merge` for each block in order. Blocks begin at whole tiles, and are whole rows
   where `by_row` is set.
4. `MaskPass.statistics` of a masks build, after the last block.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.kernels.masks import MaskStatistics
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.methods.interface import MAX_COMPILED_EXPERTS, Method, TensorFacts, num_columns

ReadBlocks = Callable[[], Iterator[InputBlock]]
"""Starts a pass over the tensor."""


@dataclass(frozen=True)
class PassRequest:
    """One tensor, or some of its rows, to be merged."""

    method: Method
    parameters: Any
    """Valid for this tensor, as instances of the method's models."""
    experts: Sequence[Any]
    tensor: TensorFacts
    start: int
    """Flat position of the first entry within the whole tensor."""
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

    @property
    def columns(self) -> int:
        """Entries of one row."""
        return num_columns(self.tensor.shape)


class CompiledPass(ABC):
    """Merges the blocks of one tensor, in their order."""

    by_row = False
    """Whether a block must hold whole rows."""

    def prepare(self, read_blocks: ReadBlocks) -> bool:
        """Read the whole tensor beforehand, where the method needs that; return False where the
        method's own code must be used after all.
        """
        return True

    @abstractmethod
    def merge(self, block: InputBlock, out: NDArray[np.uint8], masks: NDArray[np.uint8]) -> None:
        """Write the merged values of a block to `out` (bytes), and bits to `masks`, which has a row
        per expert for the whole tensor.
        """


class MaskPass(CompiledPass):
    """A pass of a masks build: it adds up statistics as it goes."""

    def __init__(self, num_experts: int) -> None:
        self.statistics = MaskStatistics(
            kept=np.zeros(num_experts, np.int64),
            agreeing=np.zeros(num_experts, np.int64),
            masked=np.zeros(num_experts, np.int64),
            consensus=np.zeros(num_experts + 1, np.int64),
            overlaps=np.zeros(num_experts * (num_experts - 1) // 2, np.int64),
            squares=np.zeros(num_experts + 1, np.float64),
        )


def find_compiled_pass(request: PassRequest) -> CompiledPass | None:
    """Return the compiled pass of a method for one tensor, None where its own code must be used."""
    target = request.method.compiled_pass
    if not target or request.dtype not in CODES or len(request.experts) > MAX_COMPILED_EXPERTS:
        return None
    compiled_pass: CompiledPass | None = _load(target)(request)
    return compiled_pass


@cache
def _load(target: str) -> Callable[[PassRequest], CompiledPass | None]:
    module_name, _, attribute = target.partition(":")
    make_pass: Callable[[PassRequest], CompiledPass | None] = getattr(
        importlib.import_module(module_name), attribute
    )
    return make_pass
