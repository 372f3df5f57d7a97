"""WUDI and OptMerge: the merged task vector that disturbs every expert least in the space its own
rows span.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from typing_extensions import override

from mmerge.workers.methods.matrix import MatrixMethod, MatrixParameters
from mmerge.workers.methods.spectral import leading_rows, squared_norms, total_of, truncate

Optimizer = Literal["adam", "sgd"]
_ADAM_MEAN, _ADAM_SQUARES, _ADAM_SMALL = 0.9, 0.999, 1e-8


def wudi_quadratic(
    targets: Sequence[torch.Tensor], subspaces: Sequence[torch.Tensor], norms: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return C [in, in] and D [out, in] of the loss Σ (1/‖τᵢ‖²)·‖(τ − targetᵢ)·subspaceᵢᵀ‖², whose
    gradient is 2(τC − D).

    An expert whose task vector is zero disturbs nothing and has no term. WUDI-Merging (arXiv
    2503.08099), section 3.
    """
    width = targets[0].shape[1]
    c = torch.zeros((width, width), dtype=targets[0].dtype, device=targets[0].device)
    d = torch.zeros_like(targets[0])
    for target, subspace, norm in zip(targets, subspaces, norms, strict=True):
        if norm > 0:
            scatter = subspace.T @ subspace / norm
            c += scatter
            d += target @ scatter
    return c, d


def descend(
    start: torch.Tensor,
    quadratic: tuple[torch.Tensor, torch.Tensor],
    *,
    optimizer: Optimizer,
    learning_rate: float,
    momentum: float,
    iterations: int,
) -> torch.Tensor:
    """Return `start` after gradient steps on the loss whose gradient is 2(τC − D).

    Adam (arXiv 1412.6980) with its usual constants, or gradient descent with momentum; the same
    bits as torch.optim.
    """
    c, d = quadratic
    merged = start.clone()
    # Written out, not taken from torch.optim: its import costs a worker four seconds and 80 MB, for
    # these few lines.
    first = torch.zeros_like(merged)
    second = torch.zeros_like(merged) if optimizer == "adam" else None
    gradient = torch.empty_like(merged)
    for step in range(1, iterations + 1):
        torch.matmul(merged, c, out=gradient)
        gradient.sub_(d).mul_(2)
        if second is None:
            first.mul_(momentum).add_(gradient)
            merged.sub_(first, alpha=learning_rate)
            continue
        first.lerp_(gradient, 1 - _ADAM_MEAN)
        second.mul_(_ADAM_SQUARES).addcmul_(gradient, gradient, value=1 - _ADAM_SQUARES)
        scale = (second.sqrt() / math.sqrt(1 - _ADAM_SQUARES**step)).add_(_ADAM_SMALL)
        merged.addcdiv_(first, scale, value=-learning_rate / (1 - _ADAM_MEAN**step))
    return merged


def wudi_merge(
    deltas: Sequence[torch.Tensor], *, learning_rate: float, iterations: int
) -> torch.Tensor:
    """Return the merged task vector of one matrix, [out, in], float32: Adam from the sum of the
    task vectors.

    WUDI-Merging (arXiv 2503.08099), algorithm 1.
    """
    quadratic = wudi_quadratic(deltas, deltas, squared_norms(deltas))
    start = total_of(deltas, "sum")
    return descend(
        start,
        quadratic,
        optimizer="adam",
        learning_rate=learning_rate,
        momentum=0.0,
        iterations=iterations,
    )


def optmerge_lora_merge(
    deltas: Sequence[torch.Tensor],
    *,
    rank: int,
    learning_rate: float,
    momentum: float,
    iterations: int,
) -> torch.Tensor:
    """Return OptMerge's merged task vector for experts trained with LoRA, [out, in], float32: SGD
    from their mean.

    Targets are the task vectors truncated to `rank`, subspaces their leading rows. OptMerge (arXiv
    2505.19892), section 3.
    """
    targets = [truncate(delta, rank=rank) for delta in deltas]
    subspaces = [leading_rows(delta, rank=rank) for delta in deltas]
    quadratic = wudi_quadratic(targets, subspaces, squared_norms(deltas))
    start = total_of(deltas, "mean")
    return descend(
        start,
        quadratic,
        optimizer="sgd",
        learning_rate=learning_rate,
        momentum=momentum,
        iterations=iterations,
    )


def optmerge_full_merge(
    deltas: Sequence[torch.Tensor], *, rank: int, learning_rate: float, iterations: int
) -> torch.Tensor:
    """Return OptMerge's merged task vector for fully tuned experts, [out, in], float32: Adam from
    their sum.

    Targets are the mean task vector plus what is left of each, truncated to `rank`; subspaces the
    leading rows of the task vectors themselves. OptMerge (arXiv 2505.19892), section 3.
    """
    mean = total_of(deltas, "mean")
    targets = [truncate(delta - mean, rank=rank) + mean for delta in deltas]
    subspaces = [leading_rows(delta, rank=rank) for delta in deltas]
    quadratic = wudi_quadratic(targets, subspaces, squared_norms(deltas))
    start = total_of(deltas, "sum")
    return descend(
        start,
        quadratic,
        optimizer="adam",
        learning_rate=learning_rate,
        momentum=0.0,
        iterations=iterations,
    )


class WudiParameters(MatrixParameters):
    """Parameters of WUDI."""

    iterations: int = Field(300, ge=0, description="steps of Adam")
    learning_rate: float = Field(1e-5, gt=0, description="step size")


class Wudi(MatrixMethod):
    """Minimise Σ (1/‖τᵢ‖²)·‖(τ − τᵢ)τᵢᵀ‖² by Adam, from the sum of the task vectors."""

    name = "wudi"
    source = "WUDI-Merging, arXiv 2503.08099"
    parameters_model = WudiParameters

    @override
    def merge_matrix(
        self, deltas: Sequence[torch.Tensor], parameters: WudiParameters
    ) -> torch.Tensor:
        return wudi_merge(
            deltas, learning_rate=parameters.learning_rate, iterations=parameters.iterations
        )


class OptmergeParameters(MatrixParameters):
    """Parameters of OptMerge; what is not given follows from the form."""

    form: Literal["lora", "full"] = Field(
        "full",
        description=(
            "for experts trained with LoRA (SGD from the mean, no centring) or fully tuned (Adam"
            " from the sum, centred)"
        ),
    )
    rank: int | None = Field(
        None,
        ge=1,
        description=(
            "rank that task vectors are truncated to; ⌊min(out, in)/n⌋ if absent, at least 1"
        ),
    )
    iterations: int = Field(300, ge=0, description="steps of the optimiser")
    learning_rate: float | None = Field(
        None, gt=0, description="step size; 1e-4 (lora) or 1e-5 (full) if absent"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD (lora)")


class Optmerge(MatrixMethod):
    """WUDI on task vectors truncated by SVD, in the space of their leading rows."""

    name = "optmerge"
    source = "OptMerge, arXiv 2505.19892; both forms of the official code"
    parameters_model = OptmergeParameters

    @override
    def merge_matrix(
        self, deltas: Sequence[torch.Tensor], parameters: OptmergeParameters
    ) -> torch.Tensor:
        rank = parameters.rank or max(1, min(deltas[0].shape) // len(deltas))
        if parameters.form == "full":
            rate = parameters.learning_rate or 1e-5
            return optmerge_full_merge(
                deltas, rank=rank, learning_rate=rate, iterations=parameters.iterations
            )
        rate = parameters.learning_rate or 1e-4
        return optmerge_lora_merge(
            deltas,
            rank=rank,
            learning_rate=rate,
            momentum=parameters.momentum,
            iterations=parameters.iterations,
        )
