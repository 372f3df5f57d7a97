"""Merge one shard: stream blocks of base and experts through the method into one object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray

from mmerge.manifests.errors import CheckpointError, RecipeError, first_line
from mmerge.manifests.format.entry import TensorRow, TensorStatistics
from mmerge.manifests.format.object_header import (
    delta_name,
    make_metadata,
    mask_name,
    packed_bytes,
)
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, TensorSpec, make_header
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.writer import ObjectWriter
from mmerge.workers.checkpoints.block_reader import InputBlock, InputReader
from mmerge.workers.checkpoints.dtypes import to_bytes, with_one_nan
from mmerge.workers.compiled.interface import (
    CompiledPass,
    MaskPass,
    PassRequest,
    ReadBlocks,
    find_compiled_pass,
)
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import (
    Block,
    Granularity,
    MergedBlock,
    Method,
    TensorFacts,
    entries_at_once,
    parse_parameters,
)
from mmerge.workers.task import MergeTask, TaskResult, TensorTask
from mmerge.workers.tasks.blocks import OpenBlocks, expect_inputs, read_blocks
from mmerge.workers.tasks.heartbeat import Heartbeat
from mmerge.workers.tasks.mask_tally import MaskTally
from mmerge.workers.tasks.object_output import store_object
from mmerge.workers.tasks.overflow import OverflowCheck
from mmerge.workers.tasks.worker_check import check_worker


class Output(Protocol):
    """Where the merged bytes go: the writer of an object, or memory."""

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`; the caller may reuse its memory when this returns."""


def merge_shard(task: MergeTask, store: Store) -> TaskResult:
    """Merge one shard into the store; a shard that a previous run finished is left as it is.

    Raises:
        InputChanged: the inputs are not those of the scan; nothing is stored.
    """

    def write_tensors(out: ObjectWriter) -> list[TensorRow]:
        header, specs = make_shard_header(task)
        with InputReader() as reader:

            def open_tensor(index: int) -> OpenBlocks:
                tensor = task.tensors[index]
                sources = (tensor.base, *tensor.experts)

                def open_blocks(at_once: int) -> Iterator[InputBlock]:
                    digests = expect_inputs(task, index)
                    return reader.blocks(sources, block_entries=at_once, digests=digests)

                return open_blocks

            out.write(header)
            return merge_tensors(task, out, specs, open_tensor=open_tensor)

    return store_object(task, store, write_tensors)


def merge_tensors(
    task: MergeTask,
    out: Output,
    specs: Sequence[TensorSpec],
    *,
    open_tensor: Callable[[int], OpenBlocks],
) -> list[TensorRow]:
    """Write the merged tensors of a task one after the other; return their rows of the table.

    Args:
        task: the task.
        out: the data of the object, without its header.
        specs: from `make_shard_header`.
        open_tensor: returns by position of a tensor what starts a pass over its inputs.
    """
    method = find_method(task.method)
    specs_by_name = {spec.name: spec for spec in specs}
    rows: list[TensorRow] = []
    with Heartbeat(f"{task.shard}: {task.method}", num_steps=len(task.tensors)) as heartbeat:
        for index, tensor in enumerate(task.tensors):
            heartbeat.start_step(f"{tensor.name} {list(tensor.base.spec.shape)}")
            merger = _TensorMerger(task, method, index, open_blocks=open_tensor(index))
            rows += merger.write(out, specs_by_name)
    return rows


def make_shard_header(task: MergeTask) -> tuple[bytes, list[TensorSpec]]:
    """Return the header of the object of a task, and the tensors in it.

    Its length does not depend on the digest of the task.
    """
    method = find_method(task.method)
    metadata = make_metadata(task.digest, role="merge", method=task.method)
    return make_header(_make_layout(task, method), metadata=metadata)


def _make_layout(task: MergeTask, method: Method) -> list[tuple[str, str, Sequence[int]]]:
    layout: list[tuple[str, str, Sequence[int]]] = []
    for tensor in task.tensors:
        shape = tensor.base.spec.shape
        if method.kind == "plain":
            layout.append((tensor.name, task.dtype, shape))
            continue
        layout.append((delta_name(tensor.name), task.dtype, shape))
        num_bytes = packed_bytes(tensor.num_entries)
        layout += [
            (mask_name(tensor.name, expert), "U8", [num_bytes]) for expert in task.expert_names
        ]
    return layout


class _TensorMerger:
    """Merges one tensor of a shard: values are written block by block, masks after the last."""

    def __init__(
        self, task: MergeTask, method: Method, index: int, *, open_blocks: OpenBlocks
    ) -> None:
        """Prepare the merge of one tensor.

        Args:
            task: its inputs are read by `open_blocks` alone.
            method: that of the task.
            index: position of the tensor in the task.
            open_blocks: starts a pass over base and experts.
        """
        self.task, self.method, self.open_blocks = task, method, open_blocks
        self.tensor: TensorTask = task.tensors[index]
        self.parameters, self.experts = parse_parameters(method, task.method_parameters[index])
        check_worker(
            method,
            source=task.method_source,
            math_library=task.math_libraries[index],
            device=method.device(self.parameters),
        )
        self.facts = TensorFacts(
            self.tensor.name,
            self.tensor.shape,
            task.thresholds[index],
            task.expert_names,
            task.earlier_results[index],
        )
        self.tally = MaskTally(len(self.experts))
        self.overflow: OverflowCheck | None = None
        if task.dtype == "F16":
            is_delta = method.kind == "masks"
            self.overflow = OverflowCheck(self.tensor, task.expert_names, is_delta)

    def write(self, out: Output, specs: Mapping[str, TensorSpec]) -> list[TensorRow]:
        """Merge the tensor into the object that is being written; return its rows of the table."""
        digest = blake3()
        num_masks = len(self.experts) if self.method.kind == "masks" else 0
        masks = np.zeros((num_masks, packed_bytes(self.tensor.num_entries)), np.uint8)
        for data in self._merge_compiled(masks) or self._merge_by_method(masks):
            digest.update(data)
            out.write(data)
        values_row = self._make_values_row(specs, digest.hexdigest())
        return [values_row, *self._write_masks(out, specs, masks)]

    def _merge_compiled(self, masks: NDArray[np.uint8]) -> Iterator[memoryview] | None:
        """Return the merged bytes block by block, None if compiled code cannot merge the tensor."""
        request = PassRequest(
            method=self.method,
            parameters=self.parameters,
            experts=self.experts,
            tensor=self.facts,
            start=self.tensor.start,
            dtype=self.task.dtype,
        )
        compiled_pass = find_compiled_pass(request)
        if compiled_pass is None:
            return None
        shape = self.tensor.base.spec.shape
        granularity: Granularity = "row" if compiled_pass.by_row else "entry"
        at_once = entries_at_once(shape, self.task.block_entries, granularity=granularity)

        def read_inputs() -> Iterator[InputBlock]:
            return self.open_blocks(at_once)

        if not compiled_pass.prepare(read_inputs):
            return None
        return self._run_pass(compiled_pass, read_inputs, masks, at_once)

    def _run_pass(
        self,
        compiled_pass: CompiledPass,
        read_inputs: ReadBlocks,
        masks: NDArray[np.uint8],
        at_once: int,
    ) -> Iterator[memoryview]:
        width = DTYPE_BYTES[self.task.dtype]
        merged = np.empty(min(at_once, self.tensor.num_entries) * width, np.uint8)
        for block in read_inputs():
            compiled_pass.merge(block, merged, masks)
            data = merged[: block.num_entries * width]
            if self.overflow is not None:
                self.overflow.check_inputs(block, data)
            yield data.data
        if isinstance(compiled_pass, MaskPass):
            self.tally.take(compiled_pass.statistics)

    def _merge_by_method(self, masks: NDArray[np.uint8]) -> Iterator[memoryview]:
        position = 0
        device = self._choose_device()
        for block in self._read_blocks():
            on_device = block if device == "cpu" else block.to_device(device)
            merged = self._merge_block(on_device)
            if self.method.kind == "masks":
                self.tally.add(block, merged)
            for row, mask in zip(masks, merged.masks, strict=True):
                packed = np.packbits(mask.reshape(-1).cpu().numpy())
                row[position // 8 :][: len(packed)] = packed
            data = to_bytes(with_one_nan(merged.values))
            if self.overflow is not None:
                inputs = (block.base, *block.experts)
                self.overflow.check_tensors(inputs, np.frombuffer(data, np.uint8), start=position)
            position += block.base.numel()
            yield data

    def _merge_block(self, block: Block) -> MergedBlock:
        """Return the method's merge of one block. Raises CheckpointError where an SVD fails."""
        try:
            return self.method.merge_block(block, self.parameters, self.experts)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            reason = first_line(error)
            raise CheckpointError(
                f"{self.facts.name}: the decomposition of its task vectors does not converge in"
                f" {self.method.name} ({reason}). Check the inputs for NaN, Inf and extreme values,"
                " or choose another method"
            ) from error

    def _choose_device(self) -> str:
        device = self.method.device(self.parameters)
        if self.tensor.granularity != "tensor":
            return "cpu"  # only work on whole matrices is worth the transfer
        if device == "cuda" and not torch.cuda.is_available():
            raise RecipeError(
                "device: this machine has no CUDA device for 'cuda'. Run where there is one, or"
                " take 'device' out"
            )
        return device

    def _read_blocks(self) -> Iterator[Block]:
        return read_blocks(
            self.tensor,
            self.open_blocks,
            facts=self.facts,
            dtype=self.task.dtype,
            block_entries=self.task.block_entries,
        )

    def _write_masks(
        self, out: Output, specs: Mapping[str, TensorSpec], masks: NDArray[np.uint8]
    ) -> list[TensorRow]:
        rows = []
        for index, packed in enumerate(masks):
            data = packed.data
            out.write(data)
            expert = self.task.expert_names[index]
            statistics = self.tally.of_expert(index, self.tensor.num_entries)
            spec = specs[mask_name(self.tensor.name, expert)]
            digest = str(blake3(data).hexdigest())
            rows.append(self._make_row(spec, "mask", expert, digest, statistics))
        return rows

    def _make_values_row(self, specs: Mapping[str, TensorSpec], digest: str) -> TensorRow:
        if self.method.kind == "masks":
            statistics = self.tally.of_values(self.tensor.num_entries)
            spec = specs[delta_name(self.tensor.name)]
            return self._make_row(spec, "delta", "", digest, statistics)
        statistics = TensorStatistics(num_entries=self.tensor.num_entries)
        return self._make_row(specs[self.tensor.name], "merged", "", digest, statistics)

    def _make_row(
        self, spec: TensorSpec, role: str, expert: str, digest: str, statistics: TensorStatistics
    ) -> TensorRow:
        return TensorRow.model_validate(
            {
                "name": self.tensor.name,
                "role": role,
                "expert": expert,
                "dtype": spec.dtype,
                "shape": self.tensor.base.spec.shape,
                "row_start": self.tensor.row_start,
                "row_stop": self.tensor.row_stop,
                "offset": spec.offset,
                "num_bytes": spec.num_bytes,
                "digest": digest,
                "statistics": statistics,
            }
        )
