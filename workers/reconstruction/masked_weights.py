"""Reconstruct weights: θ = θ₀ + (Σ factorⱼ·mⱼ / divisor)∘τ⋆, the only formula of a composite.

MMER (arXiv 2505.17110): one mask with factor 1 gives the weights of an expert (Retention), all
masks with factor 1 and divisor n those of text tokens (Expansion). EMR-Merging (arXiv
2405.17461) has other factors. Three backends give the same bits: a numba kernel on the CPU, a
Triton kernel on CUDA devices, and plain torch, the reference, for everything else. Computed in
float32, rounded once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.workers.checkpoints.dtypes import SAFETENSORS_DTYPES, to_bytes
from mmerge.workers.kernels.masked_weights import add_masked_rows
from mmerge.workers.kernels.tiles import CODES
from mmerge.workers.reconstruction.bitmask import pack_rows, unpack_rows

Bytes = NDArray[np.uint8]

THREAD_ENTRIES = 1 << 18
"""Entries per thread, at least: below that, starting a thread costs more than it saves."""


def add_masked_delta(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return base + (Σ factorsⱼ·mⱼ / divisor)∘delta, [rows, width], in `dtype` or in `out`.

    Args:
        base, delta: [rows, width], of any float dtype.
        masks: packed by rows (`bitmask.pack_rows`), uint8 [experts, rows, ⌈width/8⌉].
        factors: one per expert.
        divisor: of the sum of the masks.
        dtype: of the result; the base's if absent.
        out: memory for the result, [rows, width].
    """
    if out is None:
        out = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
    if can_use_numba(base, delta, out):
        _add_by_numba(base, delta, masks, factors=factors, divisor=divisor, out=out)
        return out
    if can_use_triton(base, delta, out):
        from mmerge.workers.kernels.masked_weights_triton import add_masked_delta_by_triton

        add_masked_delta_by_triton(base, delta, masks, factors=factors, divisor=divisor, out=out)
        return out
    return add_masked_delta_by_torch(base, delta, masks, factors=factors, divisor=divisor, out=out)


def add_masked_delta_by_torch(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write what `add_masked_delta` returns to `out` and return it: the kernels' reference."""
    weights = torch.zeros(delta.shape, dtype=torch.float32, device=delta.device)
    for mask, factor in zip(masks, factors, strict=True):
        weights += factor * unpack_rows(mask, delta.shape[1]).to(torch.float32)
    return out.copy_(base.to(torch.float32) + weights / divisor * delta.to(torch.float32))


def add_masked_tensor(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: Sequence[torch.Tensor],
    *,
    factors: Sequence[float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return base + mean(factorⱼ·mⱼ)∘delta of tensors of any shape, in `dtype`.

    `masks` are packed as they are stored (`bitmask.pack_mask`), one per factor.
    """
    shape = (1, base.numel())
    packed = torch.stack([pack_rows(mask, shape) for mask in masks])
    flat = add_masked_delta(
        base.reshape(shape),
        delta.reshape(shape),
        packed,
        factors=factors,
        divisor=float(len(masks)),
        dtype=dtype,
    )
    return flat.reshape(base.shape)


def can_use_numba(*tensors: torch.Tensor) -> bool:
    """Return whether the numba kernel takes these tensors: contiguous, on the CPU, 16 or 32 bit."""
    return all(tensor.device.type == "cpu" and _has_kernel_layout(tensor) for tensor in tensors)


def can_use_triton(*tensors: torch.Tensor) -> bool:
    """Return whether the Triton kernel takes these tensors: contiguous, on one CUDA device."""
    return _has_triton() and all(
        tensor.device.type == "cuda" and _has_kernel_layout(tensor) for tensor in tensors
    )


def _has_kernel_layout(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and SAFETENSORS_DTYPES.get(tensor.dtype) in CODES


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _add_by_numba(
    base: torch.Tensor,
    delta: torch.Tensor,
    masks: torch.Tensor,
    *,
    factors: Sequence[float],
    divisor: float,
    out: torch.Tensor,
) -> None:
    """Run the numba kernel on as many threads as torch uses; each takes a range of rows."""
    if out.numel() == 0:
        return
    num_rows = out.shape[0]
    num_threads = min(torch.get_num_threads(), max(1, out.numel() // THREAD_ENTRIES), num_rows)
    kernel = BlockKernel(
        base=base.dtype, delta=delta.dtype, out=out.dtype, factors=factors, divisor=divisor
    )
    arrays = [_to_rows(tensor) for tensor in (base, delta, out)]
    packed = masks.numpy()

    def run(thread: int) -> None:
        rows = slice(thread * num_rows // num_threads, (thread + 1) * num_rows // num_threads)
        base_rows, delta_rows, out_rows = (array[rows] for array in arrays)
        kernel.add_rows(base_rows, delta_rows, packed[:, rows], out=out_rows)

    if num_threads == 1:
        run(0)
        return
    futures = [_threads(num_threads - 1).submit(run, thread) for thread in range(1, num_threads)]
    run(0)
    for future in futures:
        future.result()


def _to_rows(tensor: torch.Tensor) -> Bytes:
    """Return the bytes of a contiguous matrix, uint8 [rows, bytes of a row]."""
    return np.frombuffer(to_bytes(tensor), np.uint8).reshape(tensor.shape[0], -1)


@cache
def _threads(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mmerge-weights")


# A forked process has the pool but none of its threads: it would wait for them forever.
os.register_at_fork(after_in_child=_threads.cache_clear)


class BlockKernel:
    """The numba kernel for blocks of one tensor: dtypes and factors are prepared once.

    Preparing them per block of half a megabyte would take a third of the time and hold the GIL.
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
        """Prepare for these dtypes, each float32, bfloat16 or float16; see `add_masked_delta`."""
        self._codes = [CODES[SAFETENSORS_DTYPES[dtype]] for dtype in (base, delta, out)]
        self._item_bytes = out.itemsize
        self._factors = np.asarray(factors, dtype=np.float32)
        self._divisor = np.float32(divisor)

    def add_block(self, base: Bytes, delta: Bytes, masks: Bytes, *, out: Bytes) -> None:
        """Write one block of the result to `out`.

        `base`, `delta` and `out` are bytes, uint8 [bytes]; `masks` packed bits, uint8 [experts,
        bytes], of which a block begins with a whole byte. `out` may be `base`, of the same dtype.
        """
        self.add_rows(base[None], delta[None], masks[:, None], out=out[None])

    def add_rows(self, base: Bytes, delta: Bytes, masks: Bytes, *, out: Bytes) -> None:
        """Write rows of the result, uint8 [rows, row bytes]; `masks` is [experts, rows, bytes]."""
        width = out.shape[1] // self._item_bytes
        if width % 8 == 0 and masks.strides[1:] == (width // 8, 1):
            # Rows that end on whole bytes of bits are one long row: fewer and fuller tiles.
            width *= len(out)
            base, delta, out = (array.reshape(1, -1) for array in (base, delta, out))
            masks = masks.reshape(len(masks), 1, -1)
        add_masked_rows(
            base,
            self._codes[0],
            delta,
            self._codes[1],
            masks,
            self._factors,
            self._divisor,
            out,
            self._codes[2],
            width,
        )


@cache
def load_kernel() -> None:
    """Load the compiled kernel now rather than at its first use."""
    kernel = BlockKernel(
        base=torch.bfloat16, delta=torch.bfloat16, out=torch.bfloat16, factors=[1.0], divisor=1.0
    )
    values, masks = np.zeros(16, np.uint8), np.zeros((1, 1), np.uint8)
    kernel.add_block(values, values, masks, out=np.empty(16, np.uint8))
