"""Arithmetic of LoRA adapters in a Linear layer: θ₀ + scale·B·A, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TILE_ROWS = 8
"""Rows whose product is computed at once, counted from the first row of the matrix.

So the bits of a value do not depend on the block in which it is computed.
"""


def low_rank_rows(
    a: torch.Tensor, b: torch.Tensor, *, scale: float, row_start: int, row_stop: int
) -> torch.Tensor:
    """Return rows `row_start` to `row_stop` of scale·B·A, float32.

    The bits of a row do not depend on the requested range.

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


@dataclass(frozen=True)
class LowRank:
    """One adapter in one Linear layer; its task vector is scale·B·A."""

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
    """Return W + Σ cᵢ·s·B_dᵢ A_dᵢ in `dtype`, [out, in]; the scales include the coefficients.

    Computed in float32 and rounded once. Model Composition (arXiv 2402.12750), parameter
    adjustment.
    """
    total = base.to(torch.float32)
    for default in defaults:
        total = total + default.product()
    return total.to(dtype)
