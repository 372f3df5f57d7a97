"""From surveys to thresholds: which survey tasks a plan needs, and what follows from their results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.manifests.manifest import FileEntry
from mmerge.manifests.store import Store
from mmerge.pipeline.plan import CopyShard, MergePlan
from mmerge.workers.checkpoint import TensorSource, identity_digest
from mmerge.workers.histograms import NUM_LOWER, add_histograms, find_bin, is_exact, to_magnitude
from mmerge.workers.methods.interface import Trimming
from mmerge.workers.survey import SparseHistogram, Survey, piece_name, read_survey
from mmerge.workers.task import CopyTensor, RefineTask, SurveyTask, TensorTask
from mmerge.workers.thresholds import trim_rank

SURVEY_VERSION = 2
"""Raised when what a survey holds changes: no older survey is then reused."""

Thresholds = tuple[tuple[tuple[float, ...], ...], ...]
"""Per merge shard, tensor piece and expert; empty per piece for methods that do not trim."""


@dataclass(frozen=True)
class InputSurvey:
    """What is known of all inputs: digests of every piece, and histograms where they were asked for."""

    digests: dict[str, list[str]]
    histograms: dict[str, SparseHistogram]
    copied: dict[tuple[str, str, int], str]
    """Digest of each copied piece by expert (empty for the base), name and first row."""

    def describe(self, tensor: TensorTask) -> list[list[str]]:
        """Return dtype and digest of a piece in base and experts: what its merge depends on."""
        sources = (tensor.base, *tensor.experts)
        digests = self.digests[piece_name(tensor.name, tensor.row_start)]
        return [[source.spec.dtype, digest] for source, digest in zip(sources, digests, strict=True)]

    def digest_of(self, shard: CopyShard, tensor: CopyTensor) -> str:
        """Return the digest of a copied piece."""
        return self.copied[(shard.expert, tensor.name, tensor.row_start)]

    def revision(self, position: int, expert: str, files: Sequence[FileEntry]) -> str:
        """Return the digest of a whole checkpoint: position 0 and an empty name are the base, i + 1 is expert i of the recipe."""
        shared = {piece: digests[position] for piece, digests in self.digests.items()}
        own = {piece_name(name, row): digest for (owner, name, row), digest in self.copied.items() if owner == expert}
        return digest_json([shared, own, [[file.name, file.digest] for file in files]])


def make_survey_tasks(plan: MergePlan, identities: dict[str, dict[str, str]], *, magnitudes: bool, fresh: bool) -> list[SurveyTask]:
    """Return the survey tasks of a plan. Their keys follow from the identity of the files, so that nothing is read twice.

    Args:
        plan: what will be merged and copied.
        identities: per checkpoint and file a text that changes when the file is replaced.
        magnitudes: whether histograms of the task vectors are needed.
        fresh: survey again, whatever is in the store.
    """
    names = tuple(expert.name for expert in plan.recipe.experts)
    merged = {tensor.name for shard in plan.merge_shards for tensor in shard.tensors}

    def make(shard: str, tensors: tuple[TensorTask, ...], copies: tuple[CopyTensor, ...], owner: str, peak_bytes: int) -> SurveyTask:
        sources = [[place(source) for source in (tensor.base, *tensor.experts)] for tensor in tensors] + [
            [place(copy.source)] for copy in copies
        ]
        pieces = [[tensor.name, tensor.row_start] for tensor in tensors] + [[copy.name, copy.row_start] for copy in copies]
        with_magnitudes = magnitudes and bool(tensors)
        return SurveyTask(
            key=digest_json([SURVEY_VERSION, with_magnitudes, plan.recipe.non_finite, pieces, sources]),
            shard=shard, expert_names=names, tensors=tensors, copies=copies, copies_owner=owner, magnitudes=with_magnitudes,
            non_finite=plan.recipe.non_finite, block_entries=plan.block_entries, peak_bytes=peak_bytes, fresh=fresh,
            num_bytes=sum(tensor.num_bytes for tensor in tensors) + sum(copy.source.spec.num_bytes for copy in copies),
        )  # fmt: skip

    def place(source: TensorSource) -> str:
        return identity_digest(identities, source)

    tasks = [make(shard.name, shard.tensors, (), "", shard.peak_bytes) for shard in plan.merge_shards]
    for copy_shard in plan.copy_shards:
        # The base's merged tensors are surveyed with the experts'; only what is left needs a pass of its own.
        copies = tuple(copy for copy in copy_shard.tensors if copy_shard.role == "carry" or copy.name not in merged)
        if copies:
            owner = f"expert {copy_shard.expert!r}" if copy_shard.expert else "base"
            tasks.append(make(copy_shard.name, (), copies, owner, copy_shard.peak_bytes))
    return tasks


def read_surveys(store: Store, plan: MergePlan, tasks: Sequence[SurveyTask]) -> InputSurvey:
    """Return the results of all survey tasks. Raises MmergeError when one is missing or damaged."""
    digests: dict[str, list[str]] = {}
    histograms: dict[str, SparseHistogram] = {}
    copied: dict[tuple[str, str, int], str] = {}
    experts = {shard.name: shard.expert for shard in plan.copy_shards}
    for task in tasks:
        survey = _read(store, task.key, task.shard)
        histograms |= survey.histograms
        for tensor in task.tensors:
            piece = piece_name(tensor.name, tensor.row_start)
            digests[piece] = survey.digests[piece]
            copied[("", tensor.name, tensor.row_start)] = survey.digests[piece][0]
        for copy in task.copies:
            piece = piece_name(f"{copy.role}/{copy.name}", copy.row_start)
            copied[(experts[task.shard], copy.name, copy.row_start)] = survey.digests[piece][0]
    return InputSurvey(digests, histograms, copied)


def _read(store: Store, key: str, shard: str) -> Survey:
    survey = read_survey(store, key)
    if survey is None:
        raise MmergeError(f"{store.uri}: the survey of {shard} is damaged or gone. Run again with --fresh")
    return survey


def resolve_thresholds(
    plan: MergePlan,
    surveys: Sequence[SurveyTask],
    survey: InputSurvey,
    *,
    trimmings: Mapping[str, Trimming] | None,
    run_refine: Callable[[Sequence[RefineTask]], None],
    store: Store,
) -> Thresholds:
    """Return the exact trim threshold of every piece and expert.

    The survey's histograms give the bin of each threshold; where a bin holds several magnitudes, a second pass over that
    expert counts within it. Scope `model` adds the histograms of all pieces, scope `tensor` those of one tensor's pieces.
    `trimmings` says by tensor what is kept.

    Raises:
        RecipeError: the densities differ between tensors, though the threshold is taken over the whole model.
    """
    if trimmings is None:
        return tuple(tuple(() for _ in shard.tensors) for shard in plan.merge_shards)
    trimming = next(iter(trimmings.values()))
    if trimming.scope == "model" and any(other != trimming for other in trimmings.values()):
        raise RecipeError("density: differs between tensors, but the threshold is taken over the whole model. Add 'scope: tensor'")
    groups = _make_groups(plan, trimming)
    bins: dict[tuple[str, int], tuple[int, int]] = {}
    for (group, position), pieces in groups.items():
        num_entries = sum(tensor.num_entries for tensor in pieces)
        chosen = trimmings[pieces[0].name]
        rank = trim_rank(num_entries, chosen.densities[position], rounding=chosen.rounding)
        if rank:
            histograms = [survey.histograms[_histogram_name(tensor, position)] for tensor in pieces]
            bins[(group, position)] = find_bin(add_histograms(histograms), rank)
    values = {key: to_magnitude(bin_number) for key, (bin_number, _) in bins.items() if is_exact(bin_number)}
    open_bins = {key: found for key, found in bins.items() if key not in values}
    refined = _refine(surveys, trimming, open_bins, run_refine, store)
    for key, (bin_number, rest) in open_bins.items():
        histograms = [refined[_histogram_name(tensor, key[1])] for tensor in groups[key]]
        values[key] = to_magnitude(bin_number, find_bin(add_histograms(histograms, num_bins=NUM_LOWER), rest)[0])
    positions = range(len(trimming.densities))
    return tuple(
        tuple(tuple(values.get((_group_of(tensor, trimming), position), 0.0) for position in positions) for tensor in shard.tensors)
        for shard in plan.merge_shards
    )


def _group_of(tensor: TensorTask, trimming: Trimming) -> str:
    return tensor.name if trimming.scope == "tensor" else ""


def _histogram_name(tensor: TensorTask, position: int) -> str:
    return f"{piece_name(tensor.name, tensor.row_start)}:{position}"


def _make_groups(plan: MergePlan, trimming: Trimming) -> dict[tuple[str, int], list[TensorTask]]:
    """Return the pieces over which each threshold is taken, by group (a tensor's name, or "" for the model) and expert."""
    groups: dict[tuple[str, int], list[TensorTask]] = {}
    for shard in plan.merge_shards:
        for tensor in shard.tensors:
            for position in range(len(trimming.densities)):
                groups.setdefault((_group_of(tensor, trimming), position), []).append(tensor)
    return groups


def _refine(
    surveys: Sequence[SurveyTask],
    trimming: Trimming,
    bins: dict[tuple[str, int], tuple[int, int]],
    run_refine: Callable[[Sequence[RefineTask]], None],
    store: Store,
) -> dict[str, SparseHistogram]:
    """Return the histograms of the lower bits within these bins."""
    positions = range(len(trimming.densities))
    tasks = []
    for survey in surveys:
        wanted = tuple(
            tuple(bins[key][0] if (key := (_group_of(tensor, trimming), position)) in bins else None for position in positions)
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
                    key=digest_json([survey.key, wanted]), shard=survey.shard, expert_names=survey.expert_names, tensors=survey.tensors,
                    bins=wanted, block_entries=survey.block_entries, num_bytes=num_bytes, peak_bytes=survey.peak_bytes,
                    fresh=survey.fresh,
                )
            )  # fmt: skip
    run_refine(tasks)
    histograms: dict[str, SparseHistogram] = {}
    for task in tasks:
        histograms |= _read(store, task.key, task.shard).histograms
    return histograms
