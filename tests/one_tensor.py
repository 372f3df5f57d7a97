"""One tensor merged by a method in memory, with its stages and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Block, MergedBlock, TensorMeasurements
from mmerge.workers.methods.ranking import ranked_value
from mmerge.workers.statistics.exact_sums import to_sum
from mmerge.workers.statistics.order_statistics import (
    find_bin,
    high_histogram,
    low_histogram,
    to_threshold,
    trim_rank,
)
from mmerge.workers.tasks.measure import count_quantities


def merge_tensor(
    method_name: str,
    base: torch.Tensor,
    experts: Sequence[torch.Tensor],
    raw: dict[str, Any] | None = None,
    *,
    expert_raw: Sequence[dict[str, Any]] | None = None,
    names: Sequence[str] | None = None,
    name: str = "w",
) -> tuple[MergedBlock, tuple[float, ...] | None]:
    """Return a method's result for a float32 tensor as the whole model, and rescalers."""
    method = find_method(method_name)
    parameters = method.parameters_model.model_validate(raw or {})
    numbers = [
        method.expert_parameters_model.model_validate(raw)
        for raw in expert_raw or [{} for _ in experts]
    ]
    names = tuple(names or (f"expert{index}" for index in range(len(experts))))
    granularity = method.granularity(parameters, numbers)
    shape = {
        "entry": (-1,),
        "row": base.shape if base.ndim == 2 else (1, -1),
        "tensor": base.shape,
    }[granularity]
    tensors = base.reshape(shape), [expert.reshape(shape) for expert in experts]
    trimming = method.trimming(parameters, numbers)
    thresholds: list[float] = []
    if trimming is not None:
        for expert, density in zip(experts, trimming.densities, strict=True):
            thresholds.append(
                _threshold(
                    expert - base, trim_rank(base.numel(), density, rounding=trimming.rounding)
                )
            )
    stage_results: dict[str, tuple[float, ...]] = {}
    for stage in method.stages(parameters, numbers):
        block = Block(
            *tensors,
            thresholds,
            torch.float32,
            name,
            0,
            tuple(base.shape),
            names,
            dict(stage_results),
        )
        measured = method.measure_block(block, parameters, numbers, stage=stage.name)
        for quantity, values in measured.items():
            if stage.measures == "sums":
                stage_results[quantity] = (
                    to_sum(
                        count_quantities({quantity: values}, measures="sums", high_bins=None)[
                            quantity
                        ]
                    ),
                )
            else:
                ranks = method.ranks(
                    parameters,
                    numbers,
                    stage=stage.name,
                    quantity=quantity,
                    num_entries=values.numel(),
                )
                stage_results[quantity] = tuple(ranked_value(values, rank) for rank in ranks)
    block = Block(
        *tensors, thresholds, torch.float32, name, 0, tuple(base.shape), names, stage_results
    )
    merged = method.merge_block(block, parameters, numbers)
    return merged, method.rescalers(
        [TensorMeasurements(name, base.numel(), stage_results)], num_experts=len(experts)
    )


def _threshold(delta: torch.Tensor, rank: int) -> float:
    if rank == 0:
        return 0.0
    high_bin, low_rank = find_bin(high_histogram(delta), rank)
    return to_threshold(high_bin, find_bin(low_histogram(delta, high_bin=high_bin), low_rank)[0])
