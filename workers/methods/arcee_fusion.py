"""Arcee Fusion: only the entries that matter most are taken from the expert."""

from __future__ import annotations

import torch


def importance_of(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Return |τ| times the Kullback-Leibler divergence of the softmaxed rows, float32, shape of the inputs [..., width].

    mergekit's Arcee Fusion.
    """
    small = 1e-8
    ours, theirs = torch.softmax(expert, dim=-1) + small, torch.softmax(base, dim=-1) + small
    divergence = (ours * torch.log(ours / theirs)).sum(dim=-1, keepdim=True)
    return (expert - base).abs() * divergence


def importance_threshold(importance: torch.Tensor) -> float:
    """Return median + 1.5·(third − first quartile), quartiles being the entries of rank ⌊q·(N−1)⌋ (from 0), exact."""
    flat = importance.reshape(-1)
    first, median, third = (float(flat.kthvalue(quarter * (flat.numel() - 1) // 4 + 1).values) for quarter in (1, 2, 3))
    return float(torch.tensor(median) + 1.5 * (torch.tensor(third) - torch.tensor(first)))


def fuse(base: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    """Return the base with every entry at or above the threshold of importance replaced by the expert's, float32."""
    importance = importance_of(base, expert)
    return torch.where(importance >= importance_threshold(importance), expert, base)
