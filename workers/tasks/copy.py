"""Copy one shard of the base, or the copied tensors of an expert, into one object."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from mmerge.manifests.format.entry import TensorRow
from mmerge.manifests.format.object_header import make_metadata
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, TensorSpec, make_header
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.writer import ObjectWriter
from mmerge.workers.checkpoints.block_reader import InputReader
from mmerge.workers.checkpoints.input_digests import PieceDigests
from mmerge.workers.task import CopyTask, CopyTensor, ScannedRows, TaskResult
from mmerge.workers.tasks.object_output import store_object

COPY_BYTES = 1 << 20
"""Bytes read and written at once."""


def copy_shard(task: CopyTask, store: Store) -> TaskResult:
    """Copy one shard into the store; one that a previous run finished is left as it is.

    Raises:
        InputChanged: the inputs are not those of the scan; nothing is stored.
    """
    layout = [
        (tensor.name, tensor.source.spec.dtype, tensor.source.spec.shape) for tensor in task.tensors
    ]
    header, specs = make_header(
        layout, metadata=make_metadata(task.digest, role=task.role, method="")
    )

    def write_tensors(out: ObjectWriter) -> list[TensorRow]:
        out.write(header)
        rows = []
        with InputReader() as reader:
            for tensor, scanned, spec in zip(task.tensors, task.scanned, specs, strict=True):
                digest = _copy_rows(tensor, scanned, reader, out)
                rows.append(_make_row(task, tensor, spec, digest))
        return rows

    return store_object(task, store, write_tensors)


def _make_row(task: CopyTask, tensor: CopyTensor, spec: TensorSpec, digest: str) -> TensorRow:
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
        digest=digest,
    )


def _copy_rows(
    tensor: CopyTensor, scanned: Sequence[ScannedRows], reader: InputReader, out: ObjectWriter
) -> str:
    """Write the rows of a tensor, and return their digest.

    The scanned pieces that hold the rows are read whole: their digests are known, and those of some
    of their rows are not.
    """
    source = tensor.source
    block_entries = COPY_BYTES // DTYPE_BYTES[source.spec.dtype]
    row_bytes = source.spec.num_bytes // max(tensor.row_stop - tensor.row_start, 1)
    hasher = blake3()
    for rows in scanned:
        first, stop = rows.row_start - tensor.row_start, rows.row_stop - tensor.row_start
        is_whole = (rows.row_start, rows.row_stop) == (tensor.row_start, tensor.row_stop)
        piece = source if is_whole else source.to_rows(first, stop)
        checksums = (rows.checksum,) if rows.checksum else ()
        digests = PieceDigests((piece,), (rows.digest,), checksums=checksums)
        position = first * row_bytes
        for block in reader.blocks((piece,), block_entries=block_entries, digests=digests):
            data = block.raw[0]
            part = data[max(-position, 0) : max(source.spec.num_bytes - position, 0)]
            position += len(data)
            if not is_whole:
                hasher.update(part)
            out.write(part)
        if is_whole:
            return rows.digest
    return str(hasher.hexdigest())
