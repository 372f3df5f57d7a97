"""Task records: pure data with all inputs and decisions that a worker needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from mmerge.manifests.digest import digest_json
from mmerge.manifests.format.entry import Role
from mmerge.manifests.stores.base import DeferredCommit
from mmerge.workers.checkpoints.input_digests import ChangedInput
from mmerge.workers.checkpoints.sources import TensorSource
from mmerge.workers.methods.interface import Granularity, Measured, MethodParameters
from mmerge.workers.modalities.prompt import Part

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
    granularity: Granularity = "entry"
    """What the method must see of this tensor at once."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor, of which this piece holds some rows."""
        piece = self.base.spec.shape
        return (self.num_rows, *piece[1:]) if piece else ()

    @property
    def start(self) -> int:
        """Position of the piece's first entry within the whole tensor."""
        return self.row_start * (self.num_entries // max(self.row_stop - self.row_start, 1))

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
    """One tensor (or some of its rows) that is copied unchanged."""

    name: str
    role: Role
    row_start: int
    row_stop: int
    source: TensorSource


@dataclass(frozen=True)
class ScannedRows:
    """Some rows of a tensor that were scanned as one piece, and their digest."""

    row_start: int
    row_stop: int
    digest: str
    checksum: str = field(default="", compare=False)
    """What a copy compares with instead of the digest; empty where the scan has none."""


ScannedDigests = tuple[tuple[str, ...], ...]
"""Per tensor, the digests that the scan found: of the base first, then of the experts."""
ScannedChecksums = tuple[tuple[str, ...], ...]
"""Per tensor, the checksums of the same scan, in the same order."""


@dataclass(frozen=True)
class ScanTask:
    """One pass over the inputs of a shard: digests, non-finite check, magnitude histograms."""

    phase: ClassVar[str] = "scan"
    key: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    copies: tuple[CopyTensor, ...]
    copies_owner: str
    identities: tuple[tuple[str, str, str], ...]
    """URI, file and identity of what is read; a result is stored only if they still hold then."""
    magnitudes: bool
    non_finite: NonFinite
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False


@dataclass(frozen=True)
class RefineTask:
    """A second pass over inputs of a shard that resolves thresholds within histogram bins."""

    phase: ClassVar[str] = "thresholds"
    key: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    input_digests: ScannedDigests
    bins: tuple[tuple[int | None, ...], ...]
    """Per tensor and expert, the histogram bin of the threshold; None if it is exact already."""
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False
    input_checksums: ScannedChecksums = ()
    """What a pass compares with instead of the digests; empty where the scan has none."""


@dataclass(frozen=True)
class MeasureTask:
    """A stage of a method over one shard: sums or histograms of `measure_block` results."""

    key: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    input_digests: ScannedDigests
    thresholds: tuple[tuple[float, ...], ...]
    method_parameters: tuple[MethodParameters, ...]
    earlier_results: tuple[Measured, ...]
    """Per tensor, results of the method's earlier stages."""
    method: str
    stage: str
    measures: Literal["sums", "ranks", "vectors"]
    high_bins: tuple[dict[str, tuple[int, ...]], ...] | None
    """Per tensor and quantity, the bins of the ranks in the second pass; None in the first."""
    dtype: str
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False
    input_checksums: ScannedChecksums = ()
    """What a pass compares with instead of the digests; empty where the scan has none."""

    @property
    def phase(self) -> str:
        """The name of this pass; the second one of `ranks` is a phase of its own."""
        return self.stage if self.high_bins is None else f"{self.stage} (exact)"


@dataclass(frozen=True)
class MergeTask:
    """Merge one shard into one object."""

    phase: ClassVar[str] = "merge"
    digest: str
    shard: str
    expert_names: tuple[str, ...]
    tensors: tuple[TensorTask, ...]
    input_digests: ScannedDigests
    thresholds: tuple[tuple[float, ...], ...]
    """Per tensor and expert; empty per tensor for methods that do not trim."""
    method: str
    method_parameters: tuple[MethodParameters, ...]
    """Per tensor, the parameters that hold for it."""
    earlier_results: tuple[Measured, ...]
    """Per tensor, results of the method's stages."""
    method_source: str | None
    """Digest of the code of a third-party method on the driver, None for a built-in one."""
    math_libraries: tuple[str, ...]
    """Per tensor, what its bits depend on beside inputs and parameters; empty for nothing."""
    dtype: str
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False
    input_checksums: ScannedChecksums = ()
    """What a pass compares with instead of the digests; empty where the scan has none."""
    verify_reused: bool = False
    """Read a stored object and compare its digest before it is reused."""


@dataclass(frozen=True)
class MergeDraft:
    """A merge task whose inputs have not been scanned: all but its digest and theirs."""

    task: MergeTask
    identity: dict[str, Any]
    """What the object's name follows from, without the digests of the inputs; JSON."""

    def complete(self, digests: ScannedDigests, checksums: ScannedChecksums) -> MergeTask:
        """Return the task for inputs of these digests. Its own digest names the object."""
        tensors = []
        for described, tensor, found in zip(
            self.identity["tensors"], self.task.tensors, digests, strict=True
        ):
            dtypes = [source.spec.dtype for source in (tensor.base, *tensor.experts)]
            inputs = [list(pair) for pair in zip(dtypes, found, strict=True)]
            tensors.append(described | {"inputs": inputs})
        return replace(
            self.task,
            digest=digest_json(self.identity | {"tensors": tensors}),
            input_digests=digests,
            input_checksums=checksums,
        )


@dataclass(frozen=True)
class OnePassTask:
    """Scan a shard and merge it in the same pass over its inputs.

    The object is held in memory until its name is known: that follows from digests of the inputs,
    and is part of the object's header. A task that finds the scan in the store reads nothing.
    """

    phase: ClassVar[str] = "merge"
    scan: ScanTask
    merge: MergeDraft
    peak_bytes: int

    @property
    def key(self) -> str:
        """The key of the scan."""
        return self.scan.key

    @property
    def shard(self) -> str:
        """The name of the shard."""
        return self.scan.shard

    @property
    def num_bytes(self) -> int:
        """Bytes of input."""
        return self.scan.num_bytes

    @property
    def fresh(self) -> bool:
        """Whether it is done whatever the store has."""
        return self.scan.fresh


@dataclass(frozen=True)
class CopyTask:
    """Copy the tensors of one shard of the base or of one expert into one object."""

    phase: ClassVar[str] = "copy"
    digest: str
    shard: str
    role: Literal["base", "carry"]
    expert: str
    tensors: tuple[CopyTensor, ...]
    scanned: tuple[tuple[ScannedRows, ...], ...]
    """Per tensor, the scanned pieces that hold its rows, in order; they may hold others as well."""
    block_entries: int
    num_bytes: int
    peak_bytes: int
    fresh: bool = False
    verify_reused: bool = False
    """Read a stored object and compare its digest before it is reused."""


@dataclass(frozen=True)
class AnswerTask:
    """Answers of one model to prompts, or the likelihoods that it gives to target answers.

    The result is stored at `answers/KEY.json`.
    """

    phase: ClassVar[str] = "answer"
    key: str
    shard: str
    model: str
    """The composite, STORE#DIGEST."""
    expert: str | None
    """Rebuild this expert alone (retention); route by modality (expansion) if None."""
    prompts: tuple[tuple[Part, ...], ...]
    """Text, and media as paths."""
    targets: tuple[tuple[int, ...], ...] | None
    """Per prompt the tokens of an answer whose likelihood is asked for; None: answer greedily."""
    max_new_tokens: int
    batch_size: int
    """Prompts at once."""
    encoders: tuple[str, ...]
    """MODULE:FUNCTION, called once per process before the model is loaded: they register encoders.
    """
    device: str
    num_bytes: int
    peak_bytes: int
    fresh: bool = False


Task = ScanTask | RefineTask | MeasureTask | OnePassTask | MergeTask | CopyTask | AnswerTask


@dataclass(frozen=True)
class TaskResult:
    """Result of any task: a small record, independent of the size of the tensors."""

    shard: str
    num_bytes: int
    """Bytes of input that were read; 0 when the result was there already."""
    reused: bool
    seconds: float
    entry: Any = None
    """The ShardEntry of a merge or copy; None for tasks whose result is in the store, and for one
    pass that found its scan there.
    """
    deferred_commits: tuple[DeferredCommit, ...] = ()
    """Files that the task wrote and the driver has to commit, in order."""
    differing: tuple[str, ...] = ()
    """Tensors whose bytes differ from those of the stored object, which was left as it is."""
    repaired: tuple[str, ...] = ()
    """Keys that were missing or damaged, and were written again."""
    notes: tuple[str, ...] = field(default=())
    changed_input: ChangedInput | None = None
    """Set where the task ended without a result, because an input is not what was scanned."""
