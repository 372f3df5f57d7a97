"""What must be known of the inputs before a shard is merged, kept in the store under the identity of the files read."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from mmerge.manifests.errors import NonFiniteError, NotFound
from mmerge.manifests.header import FLOAT_DTYPES
from mmerge.manifests.store import Store
from mmerge.workers.checkpoint import OpenStores, TensorSource, read_source
from mmerge.workers.dtypes import to_tensor
from mmerge.workers.task import NonFinite, RefineTask, SurveyTask, TaskResult, TensorTask
from mmerge.workers.thresholds import Counts, high_histogram, low_histogram, to_sparse

SparseHistogram = tuple[NDArray[np.uint16], Counts]


@dataclass(frozen=True)
class Survey:
    """The result of a survey or refine task, as it lies in the store."""

    digests: dict[str, list[str]]
    """BLAKE3 per piece ("name:row_start"): base first, then the experts; for copied tensors one."""
    histograms: dict[str, SparseHistogram]
    """By "piece:expert position": the non-empty bins of the magnitude histogram, and their counts."""
    vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """By "piece:quantity": what a stage of vectors found."""

    def to_bytes(self) -> bytes:
        """Return the survey as safetensors: histograms as arrays, digests in the metadata."""
        arrays: dict[str, NDArray[np.generic]] = {f"{name}.vector": values for name, values in self.vectors.items()}
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
            vectors = {name.removesuffix(".vector"): arrays.pop(name) for name in list(arrays) if name.endswith(".vector")}
            names = {name.rpartition(".")[0] for name in arrays}
            return cls(digests, {name: (arrays[f"{name}.bins"], arrays[f"{name}.counts"]) for name in names}, vectors)
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


def iterate_blocks(num_entries: int, block_entries: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of successive blocks of entries."""
    for start in range(0, num_entries, block_entries):
        yield start, min(start + block_entries, num_entries)


def read_block(source: TensorSource, stores: dict[str, Store], start: int, stop: int) -> tuple[memoryview, torch.Tensor]:
    """Return the bytes of entries `start` to `stop`, and their values (flat, the stored dtype)."""
    entry_bytes = source.spec.num_bytes // max(source.spec.num_entries, 1)
    data = read_source(source, stores=stores, offset=start * entry_bytes, num_bytes=(stop - start) * entry_bytes)
    return data, to_tensor(data, source.spec.dtype)


def survey_shard(task: SurveyTask, store: Store) -> TaskResult:
    """Survey one shard and leave the result in the store.

    Raises:
        NonFiniteError: an input holds NaN or Inf, and the recipe does not say `non_finite: keep`.
    """
    began = time.monotonic()
    if not task.fresh and read_survey(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began)
    stores = OpenStores()
    digests: dict[str, list[str]] = {}
    histograms: dict[str, SparseHistogram] = {}
    for tensor in task.tensors:
        _survey_tensor(task, tensor, stores, digests, histograms)
    for copy in task.copies:
        hasher = blake3()
        for start, stop in iterate_blocks(copy.source.spec.num_entries, task.block_entries):
            data, values = read_block(copy.source, stores, start, stop)
            hasher.update(data)
            _check_finite(values, copy.source, task.copies_owner, task.non_finite, position=start, first_row=copy.row_start)
        digests[piece_name(f"{copy.role}/{copy.name}", copy.row_start)] = [hasher.hexdigest()]
    store.put(survey_key(task.key), Survey(digests, histograms).to_bytes())
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - began)


def _survey_tensor(
    task: SurveyTask, tensor: TensorTask, stores: dict[str, Store], digests: dict[str, list[str]], histograms: dict[str, SparseHistogram]
) -> None:
    sources = (tensor.base, *tensor.experts)
    owners = ("base", *(f"expert {name!r}" for name in task.expert_names))
    hashers = [blake3() for _ in sources]
    counts: list[Counts | None] = [None] * len(tensor.experts)
    for start, stop in iterate_blocks(tensor.num_entries, task.block_entries):
        base: torch.Tensor | None = None
        for position, (source, owner) in enumerate(zip(sources, owners, strict=True)):
            data, values = read_block(source, stores, start, stop)
            hashers[position].update(data)
            _check_finite(values, source, owner, task.non_finite, position=start, first_row=tensor.row_start)
            widened = values.to(torch.float32)
            if base is None:
                base = widened
            elif task.magnitudes:
                _add_counts(counts, position - 1, high_histogram(widened - base))
    piece = piece_name(tensor.name, tensor.row_start)
    digests[piece] = [hasher.hexdigest() for hasher in hashers]
    for position, total in enumerate(counts):
        if total is not None:
            histograms[f"{piece}:{position}"] = to_sparse(total)


def refine_shard(task: RefineTask, store: Store) -> TaskResult:
    """Count the lower bits of the magnitudes that fall into the bins of the thresholds; leave the result in the store."""
    began = time.monotonic()
    if not task.fresh and read_survey(store, task.key) is not None:
        return TaskResult(task.shard, 0, True, time.monotonic() - began)
    stores = OpenStores()
    histograms: dict[str, SparseHistogram] = {}
    for tensor, high_bins in zip(task.tensors, task.high_bins, strict=True):
        counts: list[Counts | None] = [None] * len(high_bins)
        for start, stop in iterate_blocks(tensor.num_entries, task.block_entries):
            base = read_block(tensor.base, stores, start, stop)[1].to(torch.float32)
            for position, (source, high_bin) in enumerate(zip(tensor.experts, high_bins, strict=True)):
                if high_bin is not None:
                    delta = read_block(source, stores, start, stop)[1].to(torch.float32) - base
                    _add_counts(counts, position, low_histogram(delta, high_bin=high_bin))
        for position, total in enumerate(counts):
            if total is not None:
                histograms[f"{piece_name(tensor.name, tensor.row_start)}:{position}"] = to_sparse(total)
    store.put(survey_key(task.key), Survey({}, histograms).to_bytes())
    return TaskResult(task.shard, task.num_bytes, False, time.monotonic() - began)


def _add_counts(counts: list[Counts | None], position: int, found: Counts) -> None:
    total = counts[position]
    if total is None:
        counts[position] = found
    else:
        total += found


def _check_finite(values: torch.Tensor, source: TensorSource, owner: str, non_finite: NonFinite, *, position: int, first_row: int) -> None:
    if non_finite == "keep" or source.spec.dtype not in FLOAT_DTYPES:
        return
    finite = torch.isfinite(values.to(torch.float32))
    if bool(finite.all()):
        return
    offset = int((~finite).nonzero()[0])
    value = "NaN" if bool(values[offset].to(torch.float32).isnan()) else "Inf"
    where = _to_index(position + offset, source.spec.shape, first_row)
    raise NonFiniteError(
        f"{owner}: {source.spec.name}: {value} at {where} in {source.uri}/{source.file}. "
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
