"""Arcee Fusion: only the entries that matter most are taken from the expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from typing_extensions import override

from mmerge.workers.methods.interface import Block, Granularity, MergedBlock, Method, Parameters


def importance_of(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Return |τ| times the Kullback-Leibler divergence of the softmaxed rows, float32, shape of the
    inputs [..., width].

    mergekit's Arcee Fusion.
    """
    small = 1e-8
    ours, theirs = torch.softmax(expert, dim=-1) + small, torch.softmax(base, dim=-1) + small
    divergence = (ours * torch.log(ours / theirs)).sum(dim=-1, keepdim=True)
    return (expert - base).abs() * divergence


def importance_threshold(importance: torch.Tensor) -> float:
    """Return median + 1.5·(third − first quartile), quartiles being the entries of rank ⌊q·(N−1)⌋
    (from 0), exact.
    """
    flat = importance.reshape(-1)
    first, median, third = (
        float(flat.kthvalue(quarter * (flat.numel() - 1) // 4 + 1).values) for quarter in (1, 2, 3)
    )
    return float(torch.tensor(median) + 1.5 * (torch.tensor(third) - torch.tensor(first)))


def fuse(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Return the base with every entry at or above the threshold of importance replaced by the
    expert's, float32.
    """
    importance = importance_of(base, expert)
    return torch.where(importance >= importance_threshold(importance), expert, base)


class ArceeFusion(Method):
    """θ = θ₀ with the entries of one expert where |τ|·KL(softmax of the rows) is an outlier, per
    tensor.
    """

    name = "arcee_fusion"
    kind = "plain"
    source = "mergekit, Arcee Fusion"
    max_experts = 1

    @override
    def granularity(self, parameters: Parameters, experts: Sequence[Parameters]) -> Granularity:
        return "tensor"

    @override
    def working_bytes(self, num_entries: int, *, num_experts: int, shape: Sequence[int]) -> int:
        return 48 * num_entries

    @override
    def merge_block(
        self, block: Block, parameters: Parameters, experts: Sequence[Parameters]
    ) -> MergedBlock:
        return MergedBlock(fuse(block.base, block.experts[0]).to(block.dtype))
