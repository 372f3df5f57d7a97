"""What the whole-matrix methods share: singular vectors, norms and sums of the task vectors of one
matrix, float32.

Singular vectors that belong to a singular value of 0 (to rounding) are arbitrary: what a library
returns for them differs from machine to machine. They are left out everywhere (our choice);
matrices of full rank are not concerned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Start = Literal["sum", "mean", "zero"]
_EPSILON = 2.0**-23  # of float32


def svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return U [out, k], S [k], Vᵀ [k, in] of a float32 matrix with k = its numerical rank, largest
    first.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > s[0] * max(matrix.shape) * _EPSILON).sum()) if s.numel() else 0
    return u[:, :rank], s[:rank], vt[:rank]


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix with all its singular values set to 1 (its polar factor), those that are 0
    excepted.
    """
    u, _, vt = svd(matrix)
    return u @ vt


def truncate(delta: torch.Tensor, *, rank: int) -> torch.Tensor:
    """Return the best approximation of a matrix of rank at most `rank`, same shape."""
    u, s, vt = svd(delta)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def leading_rows(delta: torch.Tensor, *, rank: int) -> torch.Tensor:
    """Return S_k·V_kᵀ, [rank, in] at most: the leading row space of a matrix with its weights."""
    _, s, vt = svd(delta)
    return s[:rank].unsqueeze(-1) * vt[:rank]


def squared_norms(deltas: Sequence[torch.Tensor]) -> list[float]:
    """Return ‖τᵢ‖² per expert."""
    return [float(delta.norm().square()) for delta in deltas]


def total_of(deltas: Sequence[torch.Tensor], start: Start) -> torch.Tensor:
    """Return the sum or the mean of the task vectors, or zero."""
    total = torch.zeros_like(deltas[0])
    if start == "zero":
        return total
    for delta in deltas:
        total += delta
    return total if start == "sum" else total / len(deltas)
