"""What must be known of the inputs before a shard is merged, kept in the store under the identity
of the files read.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from mmerge.manifests.errors import NonFiniteError, NotFound
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES, FLOAT_DTYPES
from mmerge.manifests.stores.object_store import Store
from mmerge.workers.checkpoints.block_reader import InputBlock, InputReader
from mmerge.workers.checkpoints.checkpoint import TensorSource
from mmerge.workers.checkpoints.dtypes import to_tensor
from mmerge.workers.kernels.magnitudes import first_non_finite
from mmerge.workers.statistics.magnitude_histograms import MagnitudeCounter, count_lower
from mmerge.workers.task import (
    CopyTensor,
    NonFinite,
    RefineTask,
    SurveyTask,
    TaskResult,
    TensorTask,
)

SparseHistogram = tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]


@dataclass(frozen=True)
class Survey:
    """The result of a survey or refine task, as it lies in the store."""

    digests: dict[str, list[str]]
    """BLAKE3 per piece ("name:row_start"): base first, then the experts; for copied tensors one."""
    histograms: dict[str, SparseHistogram]
    """By "piece:expert position": the non-empty bins of the magnitude histogram, and their counts.
    """
    vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """By "piece:quantity": what a stage of vectors found."""

    def to_bytes(self) -> bytes:
        """Return the survey as safetensors: histograms as arrays, digests in the metadata."""
        arrays: dict[str, NDArray[np.generic]] = {
            f"{name}.vector": values for name, values in self.vectors.items()
        }
        for name, (bins, counts) in self.histograms.items():
            arrays |= {f"{name}.bins": bins, f"{name}.counts": counts}
        return bytes(save_arrays(arrays, metadata={"digests": json.dumps(self.digests)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> Survey:
        """Return the survey that `to_bytes` wrote. Raises ValueError when the bytes are damaged."""
        try:
            length = int.from_bytes(data[:8], "little")
            digests = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["digests"])
            arrays = load_arrays(data)
            vectors = {
                name.removesuffix(".vector"): arrays.pop(name)
                for name in list(arrays)
                if name.endswith(".vector")
            }
            names = {name.rpartition(".")[0] for name in arrays}
            return cls(
                digests,
                {name: (arrays[f"{name}.bins"], arrays[f"{name}.counts"]) for name in names},
                vectors,
            )
        except Exception as error:
            raise ValueError(f"damaged survey: {error}") from error


def survey_key(digest: str) -> str:
    """Return the key of a cached survey."""
    return f"surveys/{digest}.safetensors"


def read_survey(store: Store, digest: str) -> Survey | None:
    """Return a cached survey, or None where there is none that can be read."""
    try:
        return Survey.from_bytes(store.read(survey_key(digest)))
    except (NotFound, ValueError):
        return None


def piece_name(name: str, row_start: int) -> str:
    """Return the name of a piece of a tensor within a survey."""
    return f"{name}:{row_start}"


def survey_shard(task: SurveyTask, store: Store) -> TaskResult:
    """Survey one shard and leave the result in the store.

    Raises:
        NonFiniteError: an input holds NaN or Inf, and the recipe does not say `non_finite: keep`.
    """
    began = time.monotonic()
    if not task.fresh and read_survey(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began)
    digests: dict[str, list[str]] = {}
    histograms: dict[str, SparseHistogram] = {}
    counter = MagnitudeCounter(len(task.expert_names)) if task.magnitudes else None
    with InputReader() as reader:
        for tensor in task.tensors:
            piece = piece_name(tensor.name, tensor.row_start)
            digests[piece] = _survey_tensor(task, tensor, reader, counter)
            for position, histogram in enumerate(counter.drain() if counter else ()):
                histograms[f"{piece}:{position}"] = histogram
        for copy in task.copies:
            digests[piece_name(f"{copy.role}/{copy.name}", copy.row_start)] = [
                _survey_copy(task, copy, reader)
            ]
    store.put(survey_key(task.key), Survey(digests, histograms).to_bytes())
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - began)


def _survey_tensor(
    task: SurveyTask, tensor: TensorTask, reader: InputReader, counter: MagnitudeCounter | None
) -> list[str]:
    """Return the digests of a piece in base and experts; `counter` takes the magnitudes of its task
    vectors.
    """
    sources = (tensor.base, *tensor.experts)
    owners = ("base", *(f"expert {name!r}" for name in task.expert_names))
    hashers = [blake3() for _ in sources]
    for block in reader.blocks(sources, block_entries=task.block_entries):
        if counter:
            counter.add(block)
        # Where base or expert is NaN or Inf, so is their difference.
        is_finite = counter is not None and counter.is_finite()
        for position, (source, owner) in enumerate(zip(sources, owners, strict=True)):
            hashers[position].update(block.raw[position])
            if not is_finite:
                _check_finite(
                    block, position, source, owner, task.non_finite, first_row=tensor.row_start
                )
    return [hasher.hexdigest() for hasher in hashers]


def _survey_copy(task: SurveyTask, copy: CopyTensor, reader: InputReader) -> str:
    hasher = blake3()
    for block in reader.blocks((copy.source,), block_entries=task.block_entries):
        hasher.update(block.raw[0])
        _check_finite(
            block, 0, copy.source, task.copies_owner, task.non_finite, first_row=copy.row_start
        )
    return str(hasher.hexdigest())


def refine_shard(task: RefineTask, store: Store) -> TaskResult:
    """Count the lower bits of the magnitudes that fall into the bins of the thresholds; leave the
    result in the store.
    """
    began = time.monotonic()
    if not task.fresh and read_survey(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began)
    histograms: dict[str, SparseHistogram] = {}
    with InputReader() as reader:
        for tensor, bins in zip(task.tensors, task.bins, strict=True):
            for position, (source, bin_number) in enumerate(zip(tensor.experts, bins, strict=True)):
                if bin_number is not None:
                    blocks = reader.blocks((tensor.base, source), block_entries=task.block_entries)
                    histograms[f"{piece_name(tensor.name, tensor.row_start)}:{position}"] = (
                        count_lower(blocks, bin_number=bin_number)
                    )
    store.put(survey_key(task.key), Survey({}, histograms).to_bytes())
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
