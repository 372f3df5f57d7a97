"""The weights of a routed Linear read from a build: digested, formed and copied block by block, in one pass over the bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from mmerge.manifests.table import StoredRow
from mmerge.workers.dtypes import TORCH_DTYPES, view_tensor
from mmerge.workers.host_memory import empty_host
from mmerge.workers.kernels_form import can_form, form
from mmerge.workers.masks import pack_rows
from mmerge.workers.reader import BuildReader
from mmerge.workers.routing import Policy, RoutedWeights

BLOCK_ENTRIES = 1 << 19
"""Entries that are digested, formed and copied at once: θ₀, τ⋆ and bits of a block lie in a cache meanwhile."""


def read_routed(reader: BuildReader, name: str, *, dtype: torch.dtype, policy: Policy) -> RoutedWeights:
    """Return what the RoutedLinear of a matrix [rows, width] holds, θ_text in `dtype`.

    Raises:
        DamagedObject: bytes are not what the manifest says.
    """
    rescalers = [reader.rescaler(expert) for expert in reader.expert_names]
    rows = _single_rows(reader, name)
    if policy == "packed" and rows is not None and dtype in (torch.float32, torch.bfloat16, torch.float16):
        return _read_in_blocks(reader, rows, dtype=dtype, rescalers=rescalers)
    base = reader.read(name, "base")
    masks = torch.stack([pack_rows(reader.read_packed_mask(name, expert), base.shape) for expert in reader.expert_names])
    return RoutedWeights.make(base, reader.read(name, "delta"), masks, dtype=dtype, policy=policy, rescalers=rescalers)


def _single_rows(reader: BuildReader, name: str) -> list[StoredRow] | None:
    """Return where θ₀, τ⋆ and the masks lie, if each is one piece whose rows end on whole bytes and the compiled loop takes them."""
    pieces = [reader.pieces(name, "base"), reader.pieces(name, "delta")]
    pieces += [reader.pieces(name, "mask", expert) for expert in reader.expert_names]
    shape = reader.shape(name, "base")
    known = can_form(*(torch.empty(0, dtype=TORCH_DTYPES[found[0].dtype]) for found in pieces[:2]))
    return [found[0] for found in pieces] if known and shape[1] % 8 == 0 and all(len(found) == 1 for found in pieces) else None


def _read_in_blocks(reader: BuildReader, rows: list[StoredRow], *, dtype: torch.dtype, rescalers: list[float]) -> RoutedWeights:
    shape, count = rows[0].shape, len(rescalers)
    height, width = shape
    is_needed = count > 1  # of a single expert θ_text is all there is
    text, delta_dtype = empty_host(shape, dtype), TORCH_DTYPES[rows[1].dtype]
    delta = empty_host(shape, delta_dtype) if is_needed else None
    masks = torch.empty(count, height, width // 8, dtype=torch.uint8)
    step = max(1, BLOCK_ENTRIES // width)
    streams = [
        reader.read_blocks(row, block_bytes=step * width * TORCH_DTYPES[row.dtype].itemsize if index < 2 else step * width // 8)
        for index, row in enumerate(rows)
    ]
    for start in range(0, height, step):
        stop = min(start + step, height)
        for mask, stream in zip(masks, streams[2:], strict=True):
            bits = np.frombuffer(next(stream), np.uint8)[: (stop - start) * width // 8]
            np.copyto(mask[start:stop].numpy(), bits.reshape(stop - start, -1))
        base, change = (view_tensor(next(streams[i]), rows[i].dtype).view(stop - start, width) for i in (0, 1))
        form(base, change, masks[:, start:stop], factors=rescalers, divisor=float(count), out=text[start:stop])
        if delta is not None:
            np.copyto(_bytes(delta[start:stop]), _bytes(change))
    for stream in streams:
        _finish(stream)
    factors, divisor = RoutedWeights.factors_of(rescalers)
    return RoutedWeights(text, delta, masks if is_needed else None, None, factors, divisor)


def _bytes(values: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    found: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = values.view(torch.uint8).numpy()
    return found


def _finish(stream: Iterator[memoryview]) -> None:
    """Read what is left, the padding of packed masks, so that the digest is that of the whole piece."""
    for _ in stream:
        pass
