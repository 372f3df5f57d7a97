"""Task Singular Vectors: the leading singular vectors of every expert, made orthogonal to each
other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from mmerge.workers.methods.matrix import MatrixMethod, MatrixParameters
from mmerge.workers.methods.spectral import nearest_orthogonal, svd


def tsv_merge(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the merged task vector of one matrix, [out, in], float32.

    Of each expert the int(rank/n) leading singular triplets, at least one; the stacked left and
    right vectors are orthogonalised, then multiplied with the singular values. TSV-Merge (arXiv
    2412.00081), section 4.
    """
    share = max(1, min(deltas[0].shape) // len(deltas))
    parts = [svd(delta) for delta in deltas]
    values = torch.cat([s[:share] for _, s, _ in parts])
    if not values.numel():
        return torch.zeros_like(deltas[0])
    left = nearest_orthogonal(torch.cat([u[:, :share] for u, _, _ in parts], dim=1))
    right = nearest_orthogonal(torch.cat([vt[:share] for _, _, vt in parts]))
    return (left * values) @ right


class Tsv(MatrixMethod):
    """Keep the leading singular vectors of every expert, orthogonalise them, and put the task
    vector together again.
    """

    name = "tsv"
    source = "Task Singular Vectors (TSV-Merge), arXiv 2412.00081"

    @override
    def merge_matrix(
        self, deltas: Sequence[torch.Tensor], parameters: MatrixParameters
    ) -> torch.Tensor:
        return tsv_merge(deltas)
