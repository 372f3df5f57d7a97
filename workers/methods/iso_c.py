"""Iso-C: the summed task vector with a flat spectrum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from mmerge.workers.methods.matrix import MatrixMethod, MatrixParameters
from mmerge.workers.methods.spectral import svd, total_of


def iso_c_merge(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the summed task vector of one matrix with every singular value replaced by their mean,
    [out, in], float32.

    Iso-C (arXiv 2502.04959), section 4.1.
    """
    u, s, vt = svd(total_of(deltas, "sum"))
    return (u @ vt) * (s.sum() / min(deltas[0].shape))


class IsoC(MatrixMethod):
    """Sum the task vectors and give all singular directions the same weight."""

    name = "iso_c"
    source = "Isotropic merging (Iso-C), arXiv 2502.04959"

    @override
    def merge_matrix(
        self, deltas: Sequence[torch.Tensor], parameters: MatrixParameters
    ) -> torch.Tensor:
        return iso_c_merge(deltas)
