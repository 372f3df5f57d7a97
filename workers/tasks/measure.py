"""Runs one stage of a method: exact counts of its quantities, added block by block."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from mmerge.manifests.stores.base import Store
from mmerge.workers.checkpoints.block_reader import InputBlock, InputReader
from mmerge.workers.compiled.inner_products import sum_vector_products
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Block, TensorFacts, parse_parameters
from mmerge.workers.statistics.exact_sums import count_sum, high_ranks, low_ranks
from mmerge.workers.statistics.order_statistics import Counts, to_sparse
from mmerge.workers.task import MeasureTask, TaskResult, TensorTask
from mmerge.workers.tasks.blocks import expect_inputs, read_blocks
from mmerge.workers.tasks.scan_cache import (
    ScanResult,
    SparseHistogram,
    piece_name,
    read_scan,
    write_scan,
)

VECTOR_BLOCK_ENTRIES = 1 << 18
"""Entries at once in a stage of vectors: fixed, since float64 sums depend on what is added first.
"""


def count_quantities(
    measured: Mapping[str, torch.Tensor],
    *,
    measures: str,
    high_bins: Mapping[str, tuple[int, ...]] | None,
) -> dict[str, Counts]:
    """Return the counts of one block by quantity, to be added over blocks.

    In the second pass of ranks the keys are "quantity#bin".
    """
    if measures == "sums":
        return {quantity: count_sum(values) for quantity, values in measured.items()}
    if high_bins is None:
        return {quantity: high_ranks(values) for quantity, values in measured.items()}
    refined = {}
    for quantity, bins in high_bins.items():
        for high_bin, counts in zip(
            bins, low_ranks(measured[quantity], high_bins=bins), strict=True
        ):
            refined[f"{quantity}#{high_bin}"] = counts
    return refined


def measure_shard(task: MeasureTask, store: Store) -> TaskResult:
    """Measure one shard and leave the counts in the store, by "piece:quantity".

    Raises:
        InputChanged: the inputs are not those of the scan.
    """
    start_time = time.monotonic()
    if not task.fresh and read_scan(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - start_time)
    histograms: dict[str, SparseHistogram] = {}
    vectors: dict[str, NDArray[np.float64]] = {}
    with InputReader() as reader:
        for index in range(len(task.tensors)):
            piece = piece_name(task.tensors[index].name, task.tensors[index].row_start)
            if task.measures == "vectors":
                vectors |= {
                    f"{piece}:{quantity}": values
                    for quantity, values in _measure_vectors(task, index, reader).items()
                }
                continue
            for quantity, counts in _measure_tensor(task, index, reader).items():
                histograms[f"{piece}:{quantity}"] = to_sparse(counts)
    write_scan(store, task.key, ScanResult({}, histograms, vectors))
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - start_time)


def _measure_tensor(task: MeasureTask, index: int, reader: InputReader) -> dict[str, Counts]:
    method = find_method(task.method)
    parameters, experts = parse_parameters(method, task.method_parameters[index])
    tensor = task.tensors[index]
    for stage in method.stages(parameters, experts):
        if stage.name == task.stage and stage.products is not None:
            sources = (tensor.base, *tensor.experts)
            digests = expect_inputs(task, index)
            blocks = reader.blocks(sources, block_entries=task.block_entries, digests=digests)
            return sum_vector_products(stage.products, blocks)
    total: dict[str, Counts] = {}
    for block in _read_blocks(task, tensor, index, reader, task.block_entries):
        measured = method.measure_block(block, parameters, experts, stage=task.stage)
        high_bins = task.high_bins[index] if task.high_bins is not None else None
        for quantity, counts in count_quantities(
            measured, measures=task.measures, high_bins=high_bins
        ).items():
            total[quantity] = total[quantity] + counts if quantity in total else counts
    return total


def _measure_vectors(
    task: MeasureTask, index: int, reader: InputReader
) -> dict[str, NDArray[np.float64]]:
    method = find_method(task.method)
    parameters, experts = parse_parameters(method, task.method_parameters[index])
    total: dict[str, torch.Tensor] = {}
    tensor = replace(task.tensors[index], granularity="row")
    for block in _read_blocks(task, tensor, index, reader, VECTOR_BLOCK_ENTRIES):
        for quantity, values in method.measure_block(
            block, parameters, experts, stage=task.stage
        ).items():
            total[quantity] = total[quantity] + values if quantity in total else values
    return {
        quantity: np.asarray(values.cpu().numpy(), dtype=np.float64)
        for quantity, values in total.items()
    }


def _read_blocks(
    task: MeasureTask, tensor: TensorTask, index: int, reader: InputReader, block_entries: int
) -> Iterator[Block]:
    facts = TensorFacts(
        tensor.name,
        tensor.shape,
        task.thresholds[index],
        task.expert_names,
        task.earlier_results[index],
    )
    sources = (tensor.base, *tensor.experts)

    def open_blocks(at_once: int) -> Iterator[InputBlock]:
        return reader.blocks(sources, block_entries=at_once, digests=expect_inputs(task, index))

    return read_blocks(
        tensor,
        open_blocks,
        facts=facts,
        dtype=task.dtype,
        block_entries=block_entries,
    )
