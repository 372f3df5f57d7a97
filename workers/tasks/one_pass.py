"""Scan and merge one shard in the same pass over its inputs.

The name of an object follows from the digests of its inputs, and is part of its header: both are
known at the end of the pass. Until then the merged bytes are held in memory; what is written
afterwards, and under which name, is the same as after a scan and a merge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mmerge.manifests.format.entry import TensorRow
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.writer import ObjectWriter
from mmerge.workers.checkpoints.block_reader import InputBlock, InputReader
from mmerge.workers.checkpoints.input_digests import PieceDigests, ScanDigests, make_seed
from mmerge.workers.task import MergeTask, OnePassTask, TaskResult
from mmerge.workers.tasks.blocks import OpenBlocks
from mmerge.workers.tasks.merge import make_shard_header, merge_tensors
from mmerge.workers.tasks.object_output import store_object
from mmerge.workers.tasks.scan import check_blocks, finish_scan
from mmerge.workers.tasks.scan_cache import ScanResult, piece_name, read_scan

WRITE_BYTES = 1 << 20
"""Bytes that are hashed and written at once: they stay in the caches in between."""


def scan_and_merge(task: OnePassTask, store: Store) -> TaskResult:
    """Scan and merge one shard; its scan and its object are in the store afterwards.

    Where the scan is there already, nothing is read, and the result has no entry: the object may be
    there as well, and the merge task of the scan finds it. An object that is found under the name
    that results is compared, and kept.

    Raises:
        NonFiniteError: an input holds NaN or Inf, and the recipe does not say `non_finite: keep`.
        InputChanged: a file was replaced since the run began; nothing is stored.
    """
    start_time = time.monotonic()
    if not task.fresh and read_scan(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - start_time)
    data, rows, hashers = _merge_into_memory(task)
    scan = finish_scan(task.scan, store, hashers, {})
    merge_task = _name_merge(task, scan)
    header, _ = make_shard_header(merge_task)

    def write_tensors(out: ObjectWriter) -> list[TensorRow]:
        out.write(header)
        for start in range(0, len(data), WRITE_BYTES):
            out.write(data[start : start + WRITE_BYTES])
        return rows

    result = store_object(merge_task, store, write_tensors)
    return replace(result, num_bytes=task.num_bytes, seconds=time.monotonic() - start_time)


def _merge_into_memory(
    task: OnePassTask,
) -> tuple[memoryview, list[TensorRow], dict[str, ScanDigests]]:
    """Return the data of the object, the rows of its tensors, and the digests of the inputs."""
    draft = task.merge.task
    _, specs = make_shard_header(draft)
    memory = _Memory(sum(spec.num_bytes for spec in specs))
    hashers: dict[str, ScanDigests] = {}
    seed = make_seed()
    with InputReader() as reader:

        def open_tensor(index: int) -> OpenBlocks:
            tensor = draft.tensors[index]
            sources = (tensor.base, *tensor.experts)
            piece = piece_name(tensor.name, tensor.row_start)

            def open_blocks(at_once: int) -> Iterator[InputBlock]:
                if piece in hashers:
                    # The compiled pass of another package may read a tensor more than once.
                    digests = PieceDigests(sources, hashers[piece].hexdigests())
                    return reader.blocks(sources, block_entries=at_once, digests=digests)
                hashers[piece] = ScanDigests(len(sources), seed=seed)
                blocks = reader.blocks(sources, block_entries=at_once, digests=hashers[piece])
                return check_blocks(task.scan, tensor, blocks)

            return open_blocks

        rows = merge_tensors(draft, memory, specs, open_tensor=open_tensor)
    return memory.data, rows, hashers


def _name_merge(task: OnePassTask, scan: ScanResult) -> MergeTask:
    """Return the merge task that follows from a scan."""
    pieces = [piece_name(tensor.name, tensor.row_start) for tensor in task.merge.task.tensors]
    return task.merge.complete(
        tuple(tuple(scan.digests[piece]) for piece in pieces),
        tuple(tuple(scan.checksums[piece]) for piece in pieces),
    )


class _Memory:
    """Collects the data of one object."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = np.empty(num_bytes, np.uint8)
        self._position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, one byte per item."""
        stop = self._position + len(data)
        self._bytes[self._position : stop] = np.frombuffer(data, np.uint8)
        self._position = stop

    @property
    def data(self) -> memoryview:
        """Everything that was written."""
        return self._bytes[: self._position].data
