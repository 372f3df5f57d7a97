"""Scans the inputs of a shard; results are cached under the identity of the files read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from mmerge.manifests.errors import NonFiniteError
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, FLOAT_DTYPES
from mmerge.manifests.stores.base import Store
from mmerge.workers.checkpoints.block_reader import InputBlock, InputReader
from mmerge.workers.checkpoints.dtypes import to_tensor
from mmerge.workers.checkpoints.input_digests import (
    ScanDigests,
    check_identities,
    make_seed,
)
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.kernels.magnitudes import first_non_finite
from mmerge.workers.statistics.magnitude_histograms import MagnitudeCounter, count_lower
from mmerge.workers.task import (
    CopyTensor,
    NonFinite,
    RefineTask,
    ScanTask,
    TaskResult,
    TensorTask,
)
from mmerge.workers.tasks.blocks import expect_inputs
from mmerge.workers.tasks.scan_cache import (
    ScanResult,
    SparseHistogram,
    piece_name,
    read_scan,
    write_scan,
)


def scan_shard(task: ScanTask, store: Store) -> TaskResult:
    """Scan one shard and leave the result in the store.

    Raises:
        NonFiniteError: an input holds NaN or Inf, and the recipe does not say `non_finite: keep`.
        InputChanged: a file was replaced since the run began.
    """
    began = time.monotonic()
    if not task.fresh and read_scan(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began)
    hashers: dict[str, ScanDigests] = {}
    seed = make_seed()
    histograms: dict[str, SparseHistogram] = {}
    counter = MagnitudeCounter(len(task.expert_names)) if task.magnitudes else None
    with InputReader() as reader:
        for tensor in task.tensors:
            piece = piece_name(tensor.name, tensor.row_start)
            hashers[piece] = ScanDigests(1 + len(tensor.experts), seed=seed)
            _scan_tensor(task, tensor, reader, digests=hashers[piece], counter=counter)
            for position, histogram in enumerate(counter.drain() if counter else ()):
                histograms[f"{piece}:{position}"] = histogram
        for copy in task.copies:
            piece = piece_name(f"{copy.role}/{copy.name}", copy.row_start)
            hashers[piece] = ScanDigests(1, seed=seed)
            _scan_copy(task, copy, reader, digests=hashers[piece])
    finish_scan(task, store, hashers, histograms)
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - began)


def finish_scan(
    task: ScanTask,
    store: Store,
    hashers: Mapping[str, ScanDigests],
    histograms: dict[str, SparseHistogram],
) -> ScanResult:
    """Store what a pass over the inputs found, by piece, and return it.

    Raises:
        InputChanged: a file was replaced since the run began; nothing is stored.
    """
    sources = [source for tensor in task.tensors for source in (tensor.base, *tensor.experts)]
    sources += [copy.source for copy in task.copies]
    identities = {(uri, file): identity for uri, file, identity in task.identities}
    check_identities(sources, identities)
    digests = {piece: hasher.hexdigests() for piece, hasher in hashers.items()}
    checksums = {piece: hasher.checksums() for piece, hasher in hashers.items()}
    scan = ScanResult(digests, histograms, checksums=checksums)
    write_scan(store, task.key, scan)
    return scan


def _scan_tensor(
    task: ScanTask,
    tensor: TensorTask,
    reader: InputReader,
    *,
    digests: ScanDigests,
    counter: MagnitudeCounter | None,
) -> None:
    """Hash a piece in base and experts, and check it; `counter` counts its magnitudes."""
    sources = (tensor.base, *tensor.experts)
    blocks = reader.blocks(sources, block_entries=task.block_entries, digests=digests)
    for _ in check_blocks(task, tensor, blocks, counter=counter):
        pass


def check_blocks(
    task: ScanTask,
    tensor: TensorTask,
    blocks: Iterable[InputBlock],
    *,
    counter: MagnitudeCounter | None = None,
) -> Iterator[InputBlock]:
    """Yield blocks of base and experts once they are checked; `counter` counts their magnitudes.

    Raises:
        NonFiniteError: a value is NaN or Inf, and the recipe does not say `non_finite: keep`.
    """
    sources = (tensor.base, *tensor.experts)
    owners = ("base", *(f"expert {name!r}" for name in task.expert_names))
    for block in blocks:
        if counter:
            counter.add(block)
        # Where base or expert is NaN or Inf, so is their difference.
        is_finite = counter is not None and counter.is_finite()
        for position, (source, owner) in enumerate(zip(sources, owners, strict=True)):
            if not is_finite:
                _check_finite(
                    block, position, source, owner, task.non_finite, first_row=tensor.row_start
                )
        yield block


def _scan_copy(
    task: ScanTask, copy: CopyTensor, reader: InputReader, *, digests: ScanDigests
) -> None:
    for block in reader.blocks((copy.source,), block_entries=task.block_entries, digests=digests):
        _check_finite(
            block, 0, copy.source, task.copies_owner, task.non_finite, first_row=copy.row_start
        )


def refine_shard(task: RefineTask, store: Store) -> TaskResult:
    """Count the lower bits of magnitudes in the bins of the thresholds; store the result.

    Raises:
        InputChanged: the inputs are not those of the scan.
    """
    began = time.monotonic()
    if not task.fresh and read_scan(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began)
    histograms: dict[str, SparseHistogram] = {}
    with InputReader() as reader:
        for index, tensor in enumerate(task.tensors):
            for position, source in enumerate(tensor.experts):
                bin_number = task.bins[index][position]
                if bin_number is None:
                    continue
                sources = (tensor.base, source)
                digests = expect_inputs(task, index, experts=(position,))
                blocks = reader.blocks(sources, block_entries=task.block_entries, digests=digests)
                name = f"{piece_name(tensor.name, tensor.row_start)}:{position}"
                histograms[name] = count_lower(blocks, bin_number=bin_number)
    write_scan(store, task.key, ScanResult({}, histograms))
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - began)


def _check_finite(
    block: InputBlock,
    position: int,
    source: TensorSource,
    owner: str,
    non_finite: NonFinite,
    *,
    first_row: int,
) -> None:
    if non_finite == "keep" or source.spec.dtype not in FLOAT_DTYPES:
        return
    offset = first_non_finite(
        int(block.addresses[position]), int(block.codes[position]), block.num_entries
    )
    if offset < 0:
        return
    width = DTYPE_BYTES[source.spec.dtype]
    value = to_tensor(
        block.raw[position][offset * width : (offset + 1) * width], source.spec.dtype
    ).to(torch.float32)
    word = "NaN" if bool(value.isnan()) else "Inf"
    where = _to_index(block.start + offset, source.spec.shape, first_row)
    raise NonFiniteError(
        f"{owner}: {source.spec.name}: {word} at {where} in {source.uri}/{source.file}. "
        "Repair the checkpoint, or accept such values with 'non_finite: keep'"
    )


def _to_index(position: int, shape: Sequence[int], first_row: int) -> list[int]:
    index = []
    for axis in range(len(shape)):
        step = math.prod(shape[axis + 1 :])
        index.append(position // step)
        position %= step
    if index:
        index[0] += first_row
    return index
