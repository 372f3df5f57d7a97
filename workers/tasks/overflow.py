"""The check that merged float16 values are finite where the inputs are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.manifests.errors import NonFiniteError
from mmerge.workers.checkpoints.block_reader import InputBlock
from mmerge.workers.kernels.magnitudes import first_non_finite
from mmerge.workers.kernels.overflow import first_sum_overflow
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.task import TensorTask
from mmerge.workers.tasks.blocks import to_float_tensors

_FLOAT16 = CODES["F16"]


@dataclass(frozen=True)
class OverflowCheck:
    """Looks through the merged blocks of one tensor that is written as float16."""

    tensor: TensorTask
    expert_names: tuple[str, ...]
    is_delta: bool
    """Whether the blocks are τ⋆, to which a composite adds θ₀, rather than weights."""

    def check_inputs(self, block: InputBlock, merged: NDArray[np.uint8]) -> None:
        """Check a block that a compiled path merged. Raises NonFiniteError."""
        self._check(
            merged,
            base=(int(block.addresses[0]), int(block.codes[0])),
            start=block.start,
            read_inputs=lambda: to_float_tensors(block),
        )

    def check_tensors(
        self, inputs: Sequence[torch.Tensor], merged: NDArray[np.uint8], *, start: int
    ) -> None:
        """Check a block that a method's own code merged. Raises NonFiniteError.

        Args:
            inputs: base and experts, float32, contiguous, on the CPU.
            merged: the bytes of the merged values.
            start: position of the block's first entry within the piece.
        """
        flat = [values.reshape(-1) for values in inputs]
        self._check(
            merged,
            base=(flat[0].data_ptr(), CODES["F32"]),
            start=start,
            read_inputs=lambda: flat,
        )

    def _check(
        self,
        merged: NDArray[np.uint8],
        *,
        base: tuple[int, int],
        start: int,
        read_inputs: Callable[[], list[torch.Tensor]],
    ) -> None:
        num_entries, address = len(merged) // 2, merged.ctypes.data
        if self.is_delta:
            position = first_sum_overflow(*base, address, num_entries)
        else:
            position = first_non_finite(address, _FLOAT16, num_entries)
        if position < 0:
            return
        inputs = read_inputs()
        values = torch.from_numpy(merged.view(np.float16).astype(np.float32))
        if self.is_delta:
            values = (values + inputs[0]).to(torch.float16).to(torch.float32)
        # What is NaN or Inf in an input was accepted with `non_finite: keep`.
        is_overflow = ~values.isfinite()
        for tensor in inputs:
            is_overflow &= tensor.isfinite()
        if bool(is_overflow.any()):
            first = int(is_overflow.to(torch.uint8).argmax())
            raise NonFiniteError(self._describe(first, inputs, start=start))

    def _describe(self, position: int, inputs: Sequence[torch.Tensor], *, start: int) -> str:
        shape = self.tensor.base.spec.shape
        index = [int(axis) for axis in np.unravel_index(start + position, shape)] if shape else []
        if index:
            index[0] += self.tensor.row_start
        base, *experts = [float(values[position]) for values in inputs]
        listed = [
            f"expert {name!r} has {value:g}"
            for name, value in zip(self.expert_names, experts, strict=True)
        ]
        return (
            f"{self.tensor.name}: merged, the value at {index} overflows float16 (largest 65,504):"
            f" {', '.join(listed)}, the base has {base:g}. Write the build with 'dtype: bfloat16'"
            " or 'dtype: float32'"
        )
