"""SWUDI and ASWUDI: the loss of WUDI solved in closed form, in a filtered eigenbasis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from pydantic import Field, field_validator
from typing_extensions import override

from mmerge.workers.methods.matrix import MatrixMethod, MatrixParameters
from mmerge.workers.methods.spectral import Start, squared_norms, total_of
from mmerge.workers.methods.wudi import wudi_quadratic

Filter: TypeAlias = "Callable[[torch.Tensor], torch.Tensor]"
"""From the eigenvalues of C, ascending, to a factor in [0, 1] for each."""
RANK_RULES = (
    "none",
    "stable_rank",
    "entropy",
    "participation",
    "participation_sqrt",
    "gavish_donoho",
)
_SMALL = 1e-30


def spectral_merge(
    deltas: Sequence[torch.Tensor], *, start: Start, keep: Filter, min_eigenvalue: float
) -> torch.Tensor:
    """Return the merged task vector of one matrix, [out, in], float32.

    With C = Σ wᵢτᵢᵀτᵢ, D = Σ wᵢτᵢτᵢᵀτᵢ, wᵢ = 1/‖τᵢ‖², C = VΛVᵀ and the filter f: τ = τ₀ − τ₀·V f Vᵀ
    + D·V (f/Λ) Vᵀ (constants as in WalkerWorldPeace/MLLMerging, swudi_aswudi.py).

    Args:
        deltas: task vectors of the matrix, [out, in], float32.
        start: τ₀.
        keep: the filter f.
        min_eigenvalue: smaller eigenvalues count as this.
    """
    norms = [max(norm, 1e-12) if norm > 0 else 0.0 for norm in squared_norms(deltas)]
    if max(norms) <= 1e-12:
        return total_of(deltas, "mean")
    c, d = wudi_quadratic(deltas, deltas, norms)
    eigenvalues, basis = _eigh(c)
    eigenvalues = eigenvalues.clamp(min=min_eigenvalue)
    kept = keep(eigenvalues)
    solved = (d @ basis * (kept / eigenvalues)) @ basis.T
    if start == "zero":
        return solved
    first = total_of(deltas, start)
    return first - (first @ basis * kept) @ basis.T + solved


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    eigenvalues, basis = torch.linalg.eigh(matrix)
    return eigenvalues, basis


def exponential_filter(*, time: float | None, rank_ratio: float | None) -> Filter:
    """Return f = 1 − exp(−λ·time) on the largest ⌈rank_ratio·in⌉ eigenvalues, 0 elsewhere. None of
    either: no such limit.
    """

    def keep(eigenvalues: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(eigenvalues) if time is None else 1 - torch.exp(-eigenvalues * time)
        if rank_ratio is not None:
            count = len(eigenvalues)
            # As published: the fraction is rounded up, one thousandth being too little to count.
            kept[: count - max(1, int(count * rank_ratio + 0.999))] = 0
        return kept

    return keep


def adaptive_filter(*, rule: str, shape: Sequence[int], time: float | None = None) -> Filter:
    """Return f = 1 (with `time`: 1 − exp(−λ·time)) on as many of the largest eigenvalues as `rule`
    says, 0 elsewhere.
    """

    def keep(eigenvalues: torch.Tensor) -> torch.Tensor:
        kept = torch.ones_like(eigenvalues) if time is None else 1 - torch.exp(-eigenvalues * time)
        kept[: len(kept) - adaptive_rank(eigenvalues, rule=rule, shape=shape)] = 0
        return kept

    return keep


def adaptive_rank(eigenvalues: torch.Tensor, *, rule: str, shape: Sequence[int]) -> int:
    """Return how many eigen-directions of C are kept, 1 to their number.

    Args:
        eigenvalues: of C, ascending, positive.
        rule: one of RANK_RULES, or `cumvar_F`: as many as hold the share F of the trace. The names
            and constants are those of the official code (WalkerWorldPeace/MLLMerging,
            swudi_aswudi.py).
        shape: of the matrix, (out, in).
    """
    values = eigenvalues.flip(0)
    if rule == "none":
        rank = len(values)
    elif rule == "stable_rank":
        rank = _ceil((values * values).sum() / values[0].square().clamp(min=_SMALL))
    elif rule == "entropy":
        share = (values / values.sum().clamp(min=_SMALL)).clamp(min=_SMALL)
        rank = _ceil((-(share * share.log()).sum()).exp())
    elif rule == "participation":
        rank = _ceil(values.sum().square() / (values * values).sum().clamp(min=_SMALL))
    elif rule == "participation_sqrt":
        roots = values.sqrt()
        rank = _ceil(roots.sum().square() / (roots * roots).sum().clamp(min=_SMALL))
    elif rule == "gavish_donoho":
        roots = values.sqrt()
        rank = int((roots > _gavish_donoho(shape) * float(roots.median().clamp(min=_SMALL))).sum())
    else:
        cumulative = values.cumsum(0) / values.sum().clamp(min=_SMALL)
        rank = int((cumulative < float(rule.removeprefix("cumvar_"))).sum()) + 1
    return max(1, min(rank, len(values)))


def _ceil(value: torch.Tensor) -> int:
    return int(torch.ceil(value))


def _gavish_donoho(shape: Sequence[int]) -> float:
    """Return the threshold on singular values relative to their median, as the official code
    approximates it.
    """
    beta = min(shape) / max(shape)
    median = (
        math.sqrt(max((1 - beta) ** 2 + beta, 1e-3))
        if beta < 0.9999
        else math.sqrt(2 + math.sqrt(3))
    )
    optimal = math.sqrt(
        2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta * beta + 14 * beta + 1))
    )
    return optimal / median


class SpectralParameters(MatrixParameters):
    """Numbers that SWUDI and ASWUDI share."""

    start: Start = Field("sum", description="τ₀: the sum or the mean of the task vectors, or zero")
    min_eigenvalue: float = Field(1e-8, gt=0, description="smaller eigenvalues of C count as this")


class SwudiParameters(SpectralParameters):
    """Parameters of SWUDI."""

    time: float | None = Field(
        300.0, gt=0, description="t of the filter 1 − exp(−λt); null for none"
    )
    rank_ratio: float | None = Field(
        0.65, gt=0, le=1, description="share of the eigen-directions that is kept; null for all"
    )


class Swudi(MatrixMethod):
    """The loss of WUDI in closed form, its eigenvalues filtered by time and truncated by rank."""

    name = "swudi"
    source = "SWUDI (WalkerWorldPeace/MLLMerging, swudi_aswudi.py): C = Σ wᵢτᵢᵀτᵢ, D = Σ wᵢτᵢτᵢᵀτᵢ"
    parameters_model = SwudiParameters

    @override
    def merge_matrix(
        self, deltas: Sequence[torch.Tensor], parameters: SwudiParameters
    ) -> torch.Tensor:
        keep = exponential_filter(time=parameters.time, rank_ratio=parameters.rank_ratio)
        return spectral_merge(
            deltas, start=parameters.start, keep=keep, min_eigenvalue=parameters.min_eigenvalue
        )


class AswudiParameters(SpectralParameters):
    """Parameters of ASWUDI."""

    rank_rule: str = Field(
        "participation_sqrt",
        description=(
            f"how many eigen-directions a matrix keeps: {', '.join(RANK_RULES)}, or cumvar_F with F"
            " in (0, 1]"
        ),
    )

    time: float | None = Field(
        None,
        gt=0,
        description="t of the filter 1 − exp(−λt) on the directions that are kept; null for none",
    )

    @field_validator("rank_rule")
    @classmethod
    def _is_known(cls, rule: str) -> str:
        share = rule.removeprefix("cumvar_")
        try:
            is_valid = rule in RANK_RULES or (share != rule and 0 < float(share) <= 1)
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ValueError(
                f"expected one of {', '.join(RANK_RULES)}, or cumvar_F with F in (0, 1], got"
                f" {rule!r}"
            )
        return rule


class Aswudi(MatrixMethod):
    """SWUDI with the number of eigen-directions chosen from each matrix's own spectrum."""

    name = "aswudi"
    source = "ASWUDI (WalkerWorldPeace/MLLMerging, swudi_aswudi.py)"
    parameters_model = AswudiParameters

    @override
    def merge_matrix(
        self, deltas: Sequence[torch.Tensor], parameters: AswudiParameters
    ) -> torch.Tensor:
        keep = adaptive_filter(
            rule=parameters.rank_rule, shape=deltas[0].shape, time=parameters.time
        )
        return spectral_merge(
            deltas, start=parameters.start, keep=keep, min_eigenvalue=parameters.min_eigenvalue
        )
