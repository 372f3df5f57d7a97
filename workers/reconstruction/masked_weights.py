"""A modality's weights formed from packed bits, by the compiled loop
(workers/kernels/masked_weights.py) on torch's threads or the one that calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.workers.checkpoints.dtypes import SAFETENSORS_DTYPES
from mmerge.workers.kernels.masked_weights import NUM_ARGUMENTS, find_entry, form_parts, form_rows
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.runtime.openmp import work_together

Bytes = NDArray[np.uint8]

THREAD_ENTRIES = 1 << 18
"""Below this many entries a thread costs more than it saves."""
PART_ENTRIES = 1 << 16
"""About what a thread takes at once."""


def can_form(*tensors: torch.Tensor) -> bool:
    """Return whether the compiled loop takes these tensors: contiguous, on the CPU, float32,
    bfloat16 or float16.
    """
    return all(
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and SAFETENSORS_DTYPES.get(tensor.dtype) in CODES
        for tensor in tensors
    )


def can_form_on_device(*tensors: torch.Tensor) -> bool:
    """Return whether the Triton kernel takes these tensors: contiguous, on one CUDA device,
    float32, bfloat16 or float16.
    """
    return _has_triton() and all(
        tensor.device.type == "cuda"
        and tensor.is_contiguous()
        and SAFETENSORS_DTYPES.get(tensor.dtype) in CODES
        for tensor in tensors
    )


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def form(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    out: torch.Tensor,
) -> None:
    """Write base + (Σ factorsⱼ·masksⱼ / divisor)∘delta to `out`, with as many threads as torch
    uses.

    Args:
        base, delta: [rows, width]; see `can_form`.
        masks: packed by rows (`masks.pack_rows`), uint8 [experts, rows, ⌈width/8⌉].
        factors: one per expert.
        divisor: of their sum.
        out: [rows, width], of any dtype that `can_form` takes.
    """
    if out.numel() == 0:
        return
    work = _Work(base, delta, masks, factors, divisor, out)
    num_threads = min(torch.get_num_threads(), max(1, out.numel() // THREAD_ENTRIES), out.shape[0])
    if num_threads > 1:
        work_together(work, num_threads=num_threads)
    else:
        work.take_parts()


class _Work:
    """See `team.TeamWork`. Holds what its addresses are of."""

    def __init__(
        self,
        base: torch.Tensor,
        delta: torch.Tensor,
        masks: torch.Tensor,
        factors: Sequence[float],
        divisor: float,
        out: torch.Tensor,
    ) -> None:
        rows, width = out.shape
        if masks.stride()[1:] != (masks.shape[2], 1):
            masks = masks.contiguous()
        self._counter = np.zeros(1, np.int64)
        self._factors, self._divisor = (
            np.asarray(factors, np.float32),
            np.full(1, divisor, np.float32),
        )
        self._tensors = (base, delta, out, masks)
        places = [
            number
            for tensor in (base, delta, out)
            for number in (tensor.data_ptr(), CODES[SAFETENSORS_DTYPES[tensor.dtype]])
        ]
        self._arguments = np.array(
            [
                self._counter.ctypes.data, rows, max(1, PART_ENTRIES // width), width, *places,
                masks.data_ptr(), masks.stride(0), len(masks), self._factors.ctypes.data, self._divisor.ctypes.data,
            ],
            np.int64,
        )  # fmt: skip
        assert len(self._arguments) == NUM_ARGUMENTS

    def take_parts(self) -> None:
        form_parts(self._arguments)

    @property
    def entry(self) -> int:
        return find_entry()

    @property
    def arguments(self) -> int:
        return int(self._arguments.ctypes.data)


class BlockFormer:
    """Forms a matrix block by block, on the thread that calls, from bytes: what is the same for all
    blocks is prepared once.

    Of a block of half a megabyte the views and lookups of `form` would take a third of the time,
    and hold Python's lock.
    """

    def __init__(
        self,
        *,
        base: torch.dtype,
        delta: torch.dtype,
        out: torch.dtype,
        factors: Sequence[float],
        divisor: float,
    ) -> None:
        """Prepare; see `form`. The dtypes are those that `can_form` takes."""
        self._codes = [CODES[SAFETENSORS_DTYPES[dtype]] for dtype in (base, delta, out)]
        self._width = out.itemsize
        self._factors, self._divisor = np.asarray(factors, dtype=np.float32), np.float32(divisor)

    def form(self, base: Bytes, delta: Bytes, masks: Bytes, *, out: Bytes) -> None:
        """Write what `form` writes of a block whose entries fill whole bytes of bits.

        `base`, `delta` and `out` are its bytes, uint8 [bytes]; `masks` its packed bits, uint8
        [experts, bytes]. `out` may be `base`, of the same dtype.
        """
        form_rows(
            base[None], self._codes[0], delta[None], self._codes[1], masks[:, None],
            self._factors, self._divisor, out[None], self._codes[2], len(out) // self._width, out is base,
        )  # fmt: skip


@cache
def load_kernel() -> None:
    """Let the compiled loop be loaded now rather than at its first use."""
    former = BlockFormer(
        base=torch.bfloat16, delta=torch.bfloat16, out=torch.bfloat16, factors=[1.0], divisor=1.0
    )
    former.form(
        np.zeros(16, np.uint8),
        np.zeros(16, np.uint8),
        np.zeros((1, 1), np.uint8),
        out=np.empty(16, np.uint8),
    )
