"""Weights of a Linear with a LoRA adapter, formed block by block: θ₀ + scale·B·A, float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.checkpoint import (
    LowRankSource,
    OpenStores,
    TensorSource,
    read_source,
)
from mmerge.workers.checkpoints.dtypes import to_bytes, to_tensor

TILE_ROWS = 8
"""Rows whose product is formed at once, counted from the matrix's first row: so a value does not
depend on the block it is in.
"""


def low_rank_rows(
    a: torch.Tensor, b: torch.Tensor, *, scale: float, row_start: int, row_stop: int
) -> torch.Tensor:
    """Return rows `row_start` to `row_stop` of scale·B·A, float32, the same bits however the rows
    are asked for.

    Args:
        a: [rank, in], float32.
        b: [out, rank], float32.
        scale: alpha / rank.
        row_start, row_stop: within [0, out].
    """
    first = row_start // TILE_ROWS * TILE_ROWS
    tiles = [
        (b[start : start + TILE_ROWS] @ a) * scale for start in range(first, row_stop, TILE_ROWS)
    ]
    return torch.cat(tiles)[row_start - first : row_stop - first]


def read_low_rank(
    source: LowRankSource, stores: dict[str, ReadableStore], *, start: int, stop: int
) -> memoryview:
    """Return the bytes (float32) of entries `start` to `stop` of the weights that a source
    describes.
    """
    width = source.spec.shape[1]
    row_start, row_stop = start // width, -(-stop // width)
    factors = [_read_factor(factor, stores) for factor in (source.a, source.b)]
    product = low_rank_rows(
        factors[0],
        factors[1],
        scale=source.scale,
        row_start=source.first_row + row_start,
        row_stop=source.first_row + row_stop,
    )
    entry_bytes = source.base.spec.num_bytes // source.base.spec.num_entries
    data = read_source(
        source.base,
        stores=stores,
        offset=start * entry_bytes,
        num_bytes=(stop - start) * entry_bytes,
    )
    base = to_tensor(data, source.base.spec.dtype).to(torch.float32)
    return to_bytes(
        base + product.reshape(-1)[start - row_start * width : stop - row_start * width]
    )


def _read_factor(source: TensorSource, stores: dict[str, ReadableStore]) -> torch.Tensor:
    kept = stores.factors if isinstance(stores, OpenStores) else {}
    if source not in kept:
        data = read_source(source, stores=stores, offset=0, num_bytes=source.spec.num_bytes)
        kept[source] = (
            to_tensor(data, source.spec.dtype).to(torch.float32).reshape(source.spec.shape)
        )
    found: torch.Tensor = kept[source]
    return found


@dataclass(frozen=True)
class LowRank:
    """One adapter in one Linear: its task vector is scale·B·A."""

    a: torch.Tensor
    """[rank, in]."""
    b: torch.Tensor
    """[out, rank]."""
    scale: float

    def product(self) -> torch.Tensor:
        """Return scale·B·A, float32 [out, in]."""
        return self.b.to(torch.float32) @ self.a.to(torch.float32) * self.scale


def add_adapters(
    base: torch.Tensor, defaults: Sequence[LowRank], *, dtype: torch.dtype
) -> torch.Tensor:
    """Return W + Σ cᵢ·s·B_dᵢ A_dᵢ in `dtype`, [out, in]; the scales hold the coefficients. Computed
    in float32, rounded once.

    Model Composition (arXiv 2402.12750), parameter adjustment.
    """
    total = base.to(torch.float32)
    for default in defaults:
        total = total + default.product()
    return total.to(dtype)
