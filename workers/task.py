"""Tasks as pure data: everything a worker needs to know, and nothing it must decide."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mmerge.manifests.entry import Role
from mmerge.workers.checkpoint import TensorSource

NonFinite = Literal["error", "keep"]


@dataclass(frozen=True)
class TensorTask:
    """The same rows of one language-model tensor in base and experts."""

    name: str
    row_start: int
    row_stop: int
    num_rows: int
    base: TensorSource
    experts: tuple[TensorSource, ...]

    @property
    def num_entries(self) -> int:
        """Entries of this piece."""
        return self.base.spec.num_entries

    @property
    def num_bytes(self) -> int:
        """Bytes of this piece in base and experts."""
        return self.base.spec.num_bytes + sum(source.spec.num_bytes for source in self.experts)


@dataclass(frozen=True)
class CopyTensor:
    """One tensor (or some of its rows) that is copied as it is."""

    name: str
    role: Role
    row_start: int
    row_stop: int
    source: TensorSource


@dataclass(frozen=True)
class SurveyTask:
    """One pass over the inputs of a shard: digests, non-finite check, magnitude histograms."""

    key: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    copies: tuple[CopyTensor, ...]
    copies_owner: str
    magnitudes: bool
    non_finite: NonFinite
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False


@dataclass(frozen=True)
class RefineTask:
    """A second pass over some inputs of a shard: the thresholds that lie in bins of several magnitudes."""

    key: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    bins: tuple[tuple[int | None, ...], ...]
    """Per tensor and expert, the bin of the survey's histogram in which the threshold lies; None where no second pass is needed."""
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False


@dataclass(frozen=True)
class MergeTask:
    """Merge one shard into one object."""

    digest: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    thresholds: tuple[tuple[float, ...], ...]
    """Per tensor and expert; empty per tensor for methods that do not trim."""
    method: str
    parameters: dict[str, Any]
    expert_parameters: tuple[dict[str, Any], ...]
    dtype: str
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False


@dataclass(frozen=True)
class CopyTask:
    """Copy the tensors of one shard of the base or of one expert into one object."""

    digest: str
    shard: str
    role: Literal["base", "carry"]
    expert: str
    tensors: tuple[CopyTensor, ...]
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False


Task = SurveyTask | RefineTask | MergeTask | CopyTask


@dataclass(frozen=True)
class TaskResult:
    """What comes back from any task: small, whatever the size of the tensors."""

    shard: str
    num_bytes: int
    """Bytes of input that were read; 0 when the result was there already."""
    reused: bool
    seconds: float
    entry: Any = None
    """The ShardEntry of a merge or copy; None of a survey, whose result lies in the store."""
    notes: tuple[str, ...] = field(default=())
