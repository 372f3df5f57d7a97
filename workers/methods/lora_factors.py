"""Merges of LoRA adapters factor by factor, as the official code of Model Composition does: for
comparison only.

Averaging A and B separately does not average the products B·A that the model is made of: an adapter
given as an expert of any method is merged by its product. What is here reproduces the published
numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.workers.methods.iso_c import iso_c_merge
from mmerge.workers.methods.spectral import squared_norms, total_of, truncate
from mmerge.workers.methods.tsv import tsv_merge
from mmerge.workers.methods.wudi import descend, wudi_merge, wudi_quadratic

Strategy = Literal[
    "sum", "mean", "ties-sum", "ties-mean", "ties-max", "tsv", "iso", "wudi", "wudi2"
]
STRATEGIES: tuple[Strategy, ...] = (
    "sum",
    "mean",
    "ties-sum",
    "ties-mean",
    "ties-max",
    "tsv",
    "iso",
    "wudi",
    "wudi2",
)
Factors = Mapping[str, torch.Tensor]
"""Factors of one adapter by name, float32."""


def average_lora(
    experts: Sequence[Factors], *, strategy: Strategy, density: float = 0.2, iterations: int = 300
) -> dict[str, torch.Tensor]:
    """Return the factors of the merged adapter: every A with every A, every B with every B
    (`official_lora_average`).

    Model Composition (arXiv 2402.12750), merge_unimodal_modelcompose.py; tsv, iso, wudi and wudi2
    as in WalkerWorldPeace/MLLMerging, ModelCompose/ties_merging.py.

    Args:
        experts: factors of each adapter; equal names and shapes.
        strategy: how a factor is merged.
        density: share that `ties-…` keeps, over all factors of an adapter.
        iterations: steps of `wudi` and `wudi2`.

    Raises:
        CheckpointError: the adapters are not of the same Linears.
        ShapeMismatch: their ranks differ.
    """
    names = _check_equal(experts)
    if strategy.startswith("ties-"):
        return _merge_ties(
            [{name: factors[name] for name in names} for factors in experts],
            strategy.removeprefix("ties-"),
            density,
        )
    rules: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
        "sum": lambda parts: total_of(parts, "sum"),
        "mean": lambda parts: total_of(parts, "mean"),
        "tsv": tsv_merge,
        "iso": iso_c_merge,
        "wudi": lambda parts: wudi_merge(parts, learning_rate=1e-5, iterations=iterations),
        "wudi2": lambda parts: _wudi2(parts, iterations=iterations),
    }
    return {
        name: rules[strategy]([factors[name].to(torch.float32) for factors in experts])
        for name in names
    }


def _check_equal(experts: Sequence[Factors]) -> list[str]:
    first = set(experts[0])
    for position, factors in enumerate(experts):
        different = sorted(first.symmetric_difference(factors))
        if different:
            raise CheckpointError(
                f"{different[0]}: only one of adapters 1 and {position + 1} has it; factors can be"
                " averaged one by one only where all adapters are of the same Linears. Give the"
                " adapters as experts of a recipe: their products are merged then"
            )
        for name in sorted(first):
            if factors[name].shape != experts[0][name].shape:
                raise ShapeMismatch(
                    f"{name}: adapter {position + 1} has {tuple(factors[name].shape)}, adapter 1"
                    f" has {tuple(experts[0][name].shape)}; factors can be averaged one by one only"
                    " where ranks are equal. Give the adapters as experts of a recipe: their"
                    " products are merged then"
                )
    return sorted(first)


def _wudi2(parts: Sequence[torch.Tensor], *, iterations: int) -> torch.Tensor:
    """Return OptMerge on one factor: targets truncated to a fifth of the rank, whole factors as
    subspaces, SGD from the mean.
    """
    targets = [truncate(part, rank=min(part.shape) // 5) for part in parts]
    quadratic = wudi_quadratic(targets, parts, squared_norms(parts))
    start = total_of(parts, "mean")
    return descend(
        start, quadratic, optimizer="sgd", learning_rate=5e-2, momentum=0.9, iterations=iterations
    )


def _merge_ties(
    experts: Sequence[Factors], reduction: str, density: float
) -> dict[str, torch.Tensor]:
    """Return TIES on all factors of an adapter as one vector; a zero sum takes the majority sign,
    as published.
    """
    names = list(experts[0])
    flat = torch.stack(
        [
            torch.cat([factors[name].to(torch.float32).reshape(-1) for name in names])
            for factors in experts
        ]
    )
    rank = flat.shape[1] - int(density * flat.shape[1])
    if rank:
        flat = torch.where(
            flat.abs() >= flat.abs().kthvalue(rank, dim=1, keepdim=True).values,
            flat,
            torch.zeros_like(flat),
        )
    sign = flat.sum(dim=0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    chosen = torch.where(torch.where(sign > 0, flat > 0, flat < 0), flat, torch.zeros_like(flat))
    if reduction == "max":
        merged = chosen.abs().amax(dim=0) * sign
    else:
        merged = chosen.sum(dim=0)
        if reduction == "mean":
            merged = merged / (chosen != 0).sum(dim=0).clamp(min=1)
    parts = torch.split(merged, [experts[0][name].numel() for name in names])
    return {
        name: part.reshape(experts[0][name].shape) for name, part in zip(names, parts, strict=True)
    }
