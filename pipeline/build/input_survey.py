"""From surveys to thresholds: which survey tasks a plan needs, and what follows from their results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.manifests.format.manifest import FileEntry
from mmerge.manifests.stores.object_store import Store
from mmerge.pipeline.planning.plan import CopyShard, MergePlan, MergeShard
from mmerge.workers.checkpoints.checkpoint import TensorSource, identity_digest
from mmerge.workers.methods.interface import Trimming
from mmerge.workers.statistics.magnitude_histograms import (
    NUM_LOWER,
    HistogramSum,
    add_histograms,
    find_bin,
    is_exact,
    to_magnitude,
)
from mmerge.workers.statistics.order_statistics import trim_rank
from mmerge.workers.task import CopyTensor, RefineTask, SurveyTask, TensorTask
from mmerge.workers.tasks.scan_cache import ScanResult, SparseHistogram, piece_name, read_scan

SURVEY_VERSION = 2
"""Raised when what a survey holds changes: no older survey is then reused."""

Thresholds = tuple[tuple[tuple[float, ...], ...], ...]
"""Per merge shard, tensor piece and expert; empty per piece for methods that do not trim."""


@dataclass(frozen=True)
class InputSurvey:
    """What is known of the inputs so far: digests of every piece, and histograms where they were
    asked for.

    Histograms are `pooled` where all that is wanted of them is their sum over the model: the pieces
    of a large one would fill the memory.
    """

    pooled: bool = False
    digests: dict[str, list[str]] = field(default_factory=dict)
    histograms: dict[str, SparseHistogram] = field(default_factory=dict)
    sums: dict[int, HistogramSum] = field(default_factory=dict)
    """By the expert's position, over the whole model."""
    copied: dict[tuple[str, str, int], str] = field(default_factory=dict)
    """Digest of each copied piece by expert (empty for the base), name and first row."""

    def add(self, task: SurveyTask, found: ScanResult, *, expert: str) -> None:
        """Take what a task found; `expert` is the owner of what it only copies, empty for the base."""
        if not self.pooled:
            self.histograms.update(found.histograms)
        for tensor in task.tensors:
            for position in range(len(tensor.experts)) if self.pooled else ():
                self.sums.setdefault(position, HistogramSum()).add(
                    found.histograms[_histogram_name(tensor, position)]
                )
            piece = piece_name(tensor.name, tensor.row_start)
            self.digests[piece] = found.digests[piece]
            self.copied[("", tensor.name, tensor.row_start)] = found.digests[piece][0]
        for copy in task.copies:
            piece = piece_name(f"{copy.role}/{copy.name}", copy.row_start)
            self.copied[(expert, copy.name, copy.row_start)] = found.digests[piece][0]

    def forget_histograms(self, tensor: TensorTask) -> None:
        """Drop the histograms of a piece: its thresholds are known."""
        for position in range(len(tensor.experts)):
            self.histograms.pop(_histogram_name(tensor, position), None)

    def knows(self, shard: CopyShard) -> bool:
        """Return whether all that a copied shard holds is surveyed."""
        return all(
            (shard.expert, tensor.name, tensor.row_start) in self.copied for tensor in shard.tensors
        )

    def describe(self, tensor: TensorTask) -> list[list[str]]:
        """Return dtype and digest of a piece in base and experts: what its merge depends on."""
        sources = (tensor.base, *tensor.experts)
        digests = self.digests[piece_name(tensor.name, tensor.row_start)]
        return [
            [source.spec.dtype, digest] for source, digest in zip(sources, digests, strict=True)
        ]

    def digest_of(self, shard: CopyShard, tensor: CopyTensor) -> str:
        """Return the digest of a copied piece."""
        return self.copied[(shard.expert, tensor.name, tensor.row_start)]

    def revision(self, position: int, expert: str, files: Sequence[FileEntry]) -> str:
        """Return the digest of a whole checkpoint: position 0 and an empty name are the base, i + 1
        is expert i of the recipe.
        """
        shared = {piece: digests[position] for piece, digests in self.digests.items()}
        own = {
            piece_name(name, row): digest
            for (owner, name, row), digest in self.copied.items()
            if owner == expert
        }
        return digest_json([shared, own, [[file.name, file.digest] for file in files]])


def make_survey_tasks(
    plan: MergePlan, identities: dict[str, dict[str, str]], *, magnitudes: bool, fresh: bool
) -> list[SurveyTask]:
    """Return the survey tasks of a plan. Their keys follow from the identity of the files, so that
    nothing is read twice.

    Args:
        plan: what will be merged and copied.
        identities: per checkpoint and file a text that changes when the file is replaced.
        magnitudes: whether histograms of the task vectors are needed.
        fresh: survey again, whatever is in the store.
    """
    names = tuple(expert.name for expert in plan.recipe.experts)
    merged = {tensor.name for shard in plan.merge_shards for tensor in shard.tensors}

    def make(
        shard: str,
        tensors: tuple[TensorTask, ...],
        copies: tuple[CopyTensor, ...],
        owner: str,
        peak_bytes: int,
    ) -> SurveyTask:
        sources = [
            [place(source) for source in (tensor.base, *tensor.experts)] for tensor in tensors
        ] + [[place(copy.source)] for copy in copies]
        pieces = [[tensor.name, tensor.row_start] for tensor in tensors] + [
            [copy.name, copy.row_start] for copy in copies
        ]
        with_magnitudes = magnitudes and bool(tensors)
        return SurveyTask(
            key=digest_json([SURVEY_VERSION, with_magnitudes, plan.recipe.non_finite, pieces, sources]),
            shard=shard, expert_names=names, tensors=tensors, copies=copies, copies_owner=owner, magnitudes=with_magnitudes,
            non_finite=plan.recipe.non_finite, block_entries=plan.block_entries, peak_bytes=peak_bytes, fresh=fresh,
            num_bytes=sum(tensor.num_bytes for tensor in tensors) + sum(copy.source.spec.num_bytes for copy in copies),
        )  # fmt: skip

    def place(source: TensorSource) -> str:
        return identity_digest(identities, source)

    tasks = [
        make(shard.name, shard.tensors, (), "", shard.peak_bytes) for shard in plan.merge_shards
    ]
    for copy_shard in plan.copy_shards:
        # The base's merged tensors are surveyed with the experts'; only what is left needs a pass
        # of its own.
        copies = tuple(
            copy
            for copy in copy_shard.tensors
            if copy_shard.role == "carry" or copy.name not in merged
        )
        if copies:
            owner = f"expert {copy_shard.expert!r}" if copy_shard.expert else "base"
            tasks.append(make(copy_shard.name, (), copies, owner, copy_shard.peak_bytes))
    return tasks


def read_task_survey(store: Store, task: SurveyTask | RefineTask) -> ScanResult:
    """Return what a task left in the store. Raises MmergeError when it is missing or damaged."""
    survey = read_scan(store, task.key)
    if survey is None:
        raise MmergeError(
            f"{store.uri}: the survey of {task.shard} is damaged or gone. Run again with --fresh"
        )
    return survey


class ThresholdSearch:
    """The exact trim thresholds of some shards, as far as their surveys name them.

    The survey's histograms give the bin of each threshold; where a bin holds several magnitudes, a
    second pass over that expert counts within it. Scope `model` adds the histograms of all pieces,
    scope `tensor` those of one tensor's pieces.

    Args:
        shards: all that share thresholds.
        surveys: of these shards.
        survey: what they found.
        trimmings: by tensor what is kept; None for methods that do not trim.

    Raises:
        RecipeError: the densities differ between tensors, though the threshold is taken over the
            whole model.
    """

    def __init__(
        self,
        shards: Sequence[MergeShard],
        surveys: Sequence[SurveyTask],
        survey: InputSurvey,
        trimmings: Mapping[str, Trimming] | None,
    ) -> None:
        self._shards, self._surveys = shards, surveys
        self._trimming = next(iter(trimmings.values())) if trimmings else None
        self._values: dict[tuple[str, int], float] = {}
        self._open: dict[tuple[str, int], tuple[int, int]] = {}
        self._groups: dict[tuple[str, int], list[TensorTask]] = {}
        if trimmings is None or self._trimming is None:
            return
        if self._trimming.scope == "model" and any(
            other != self._trimming for other in trimmings.values()
        ):
            raise RecipeError(
                "density: differs between tensors, but the threshold is taken over the whole model. Add 'scope: tensor'"
            )
        self._groups = _make_groups(shards, self._trimming)
        for (group, position), pieces in self._groups.items():
            num_entries = sum(tensor.num_entries for tensor in pieces)
            chosen = trimmings[pieces[0].name]
            rank = trim_rank(num_entries, chosen.densities[position], rounding=chosen.rounding)
            if not rank:
                continue
            if survey.pooled:
                histogram = survey.sums[position].histogram()
            else:
                histogram = add_histograms(
                    [survey.histograms[_histogram_name(tensor, position)] for tensor in pieces]
                )
            bin_number, rest = find_bin(histogram, rank)
            if is_exact(bin_number):
                self._values[(group, position)] = to_magnitude(bin_number)
            else:
                self._open[(group, position)] = (bin_number, rest)

    def refine_tasks(self) -> list[RefineTask]:
        """Return the second passes that the search needs: over the lower bits within the bins that
        hold several magnitudes.
        """
        if self._trimming is None:
            return []
        trimming, tasks = self._trimming, []
        positions = range(len(trimming.densities))
        for survey in self._surveys:
            wanted = tuple(
                tuple(
                    self._open[key][0]
                    if (key := (_group_of(tensor, trimming), position)) in self._open
                    else None
                    for position in positions
                )
                for tensor in survey.tensors
            )
            num_bytes = sum(
                tensor.base.spec.num_bytes + tensor.experts[position].spec.num_bytes
                for tensor, row in zip(survey.tensors, wanted, strict=True)
                for position in positions
                if row[position] is not None
            )
            if num_bytes:
                tasks.append(
                    RefineTask(
                        key=digest_json([survey.key, wanted]), shard=survey.shard, expert_names=survey.expert_names,
                        tensors=survey.tensors, bins=wanted, block_entries=survey.block_entries, num_bytes=num_bytes,
                        peak_bytes=survey.peak_bytes, fresh=survey.fresh,
                    )
                )  # fmt: skip
        return tasks

    def finish(self, refined: Iterable[Mapping[str, SparseHistogram]]) -> Thresholds:
        """Return the thresholds; `refined` is what the tasks of `refine_tasks` found, one after the
        other.
        """
        if self._trimming is None:
            return tuple(tuple(() for _ in shard.tensors) for shard in self._shards)
        trimming, values = self._trimming, dict(self._values)
        positions = range(len(trimming.densities))
        wanted = {
            _histogram_name(tensor, key[1]): key
            for key in self._open
            for tensor in self._groups[key]
        }
        sums: dict[tuple[str, int], HistogramSum] = {}
        for found in refined:
            for name in found.keys() & wanted.keys():
                sums.setdefault(wanted[name], HistogramSum(NUM_LOWER)).add(found[name])
        for key, (bin_number, rest) in self._open.items():
            values[key] = to_magnitude(bin_number, find_bin(sums[key].histogram(), rest)[0])
        return tuple(
            tuple(
                tuple(
                    values.get((_group_of(tensor, trimming), position), 0.0)
                    for position in positions
                )
                for tensor in shard.tensors
            )
            for shard in self._shards
        )


def _group_of(tensor: TensorTask, trimming: Trimming) -> str:
    return tensor.name if trimming.scope == "tensor" else ""


def _histogram_name(tensor: TensorTask, position: int) -> str:
    return f"{piece_name(tensor.name, tensor.row_start)}:{position}"


def _make_groups(
    shards: Sequence[MergeShard], trimming: Trimming
) -> dict[tuple[str, int], list[TensorTask]]:
    """Return the pieces over which each threshold is taken, by group (a tensor's name, or "" for
    the model) and expert.
    """
    groups: dict[tuple[str, int], list[TensorTask]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            for position in range(len(trimming.densities)):
                groups.setdefault((_group_of(tensor, trimming), position), []).append(tensor)
    return groups
