"""Copy one shard of the base, or the copied tensors of an expert, into one object."""

from __future__ import annotations

from blake3 import blake3

from mmerge.manifests.format.entry import TensorRow
from mmerge.manifests.format.object_header import make_metadata
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, TensorSpec, make_header
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.writer import ObjectWriter
from mmerge.workers.checkpoints.block_reader import InputReader
from mmerge.workers.task import CopyTask, CopyTensor, TaskResult
from mmerge.workers.tasks.object_output import store_object

COPY_BYTES = 1 << 20
"""Bytes read and written at once."""


def copy_shard(task: CopyTask, store: Store) -> TaskResult:
    """Copy one shard into the store; one that a previous run finished is left as it is."""
    layout = [
        (tensor.name, tensor.source.spec.dtype, tensor.source.spec.shape) for tensor in task.tensors
    ]
    header, specs = make_header(
        layout, metadata=make_metadata(task.digest, role=task.role, method="")
    )

    def write_tensors(out: ObjectWriter) -> list[TensorRow]:
        out.write(header)
        with InputReader() as reader:
            return [
                _copy_tensor(task, tensor, spec, out, reader)
                for tensor, spec in zip(task.tensors, specs, strict=True)
            ]

    return store_object(task, store, write_tensors)


def _copy_tensor(
    task: CopyTask, tensor: CopyTensor, spec: TensorSpec, out: ObjectWriter, reader: InputReader
) -> TensorRow:
    digest = blake3()
    block_entries = COPY_BYTES // DTYPE_BYTES[spec.dtype]
    for block in reader.blocks((tensor.source,), block_entries=block_entries):
        digest.update(block.raw[0])
        out.write(block.raw[0])
    return TensorRow(
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
