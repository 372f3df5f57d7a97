"""Copy one shard of the base, or the copied tensors of an expert, into one object."""

from __future__ import annotations

import time

from blake3 import blake3

from mmerge.manifests.format.entry import (
    ObjectEntry,
    ShardEntry,
    TensorRow,
    object_key,
    read_entry,
    write_entry,
)
from mmerge.manifests.format.object_header import make_metadata
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, make_header
from mmerge.manifests.stores.base import Store
from mmerge.workers.checkpoints.block_reader import InputReader
from mmerge.workers.task import CopyTask, TaskResult

COPY_BYTES = 1 << 20
"""Bytes read and written at once."""


def copy_shard(task: CopyTask, store: Store) -> TaskResult:
    """Copy one shard into the store; one that a previous run finished is left as it is."""
    start_time = time.monotonic()
    stored_entry = None if task.fresh else read_entry(store, task.digest)
    if stored_entry is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - start_time, stored_entry)
    layout = [
        (tensor.name, tensor.source.spec.dtype, tensor.source.spec.shape) for tensor in task.tensors
    ]
    header, specs = make_header(
        layout, metadata=make_metadata(task.digest, role=task.role, method="")
    )
    rows = []
    with InputReader() as reader, store.open_writer(object_key(task.digest)) as out:
        out.write(header)
        for tensor, spec in zip(task.tensors, specs, strict=True):
            digest = blake3()
            for block in reader.blocks(
                (tensor.source,), block_entries=COPY_BYTES // DTYPE_BYTES[spec.dtype]
            ):
                digest.update(block.raw[0])
                out.write(block.raw[0])
            rows.append(
                TensorRow(
                    name=tensor.name,
                    role=tensor.role,
                    expert=task.expert,
                    dtype=spec.dtype,
                    shape=spec.shape,
                    row_start=tensor.row_start,
                    row_stop=tensor.row_stop,
                    offset=spec.offset,
                    num_bytes=spec.num_bytes,
                    digest=digest.hexdigest(),
                )
            )
    entry = ShardEntry(
        object=ObjectEntry(
            key=out.key,
            shard=task.shard,
            role=task.role,
            expert=task.expert,
            num_bytes=out.num_bytes,
            digest=out.hexdigest(),
        ),
        tensors=tuple(rows),
    )
    write_entry(store, task.digest, entry)
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - start_time, entry)
