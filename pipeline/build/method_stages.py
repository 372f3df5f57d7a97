"""The stages of a method: which measure tasks they need, and the numbers that follow from their
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.manifests.stores.object_store import Store
from mmerge.pipeline.build.input_survey import Thresholds
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.workers.methods.interface import (
    Known,
    Method,
    Numbers,
    Stage,
    TensorKnown,
    TensorVectors,
    parse_numbers,
)
from mmerge.workers.statistics.exact_sums import NUM_RANK_BINS, NUM_SUM_BINS, to_ranked, to_sum
from mmerge.workers.statistics.order_statistics import Counts, add_sparse, find_bin
from mmerge.workers.task import MeasureTask, SurveyTask, TensorTask
from mmerge.workers.tasks.scan_cache import ScanResult, SparseHistogram, piece_name, read_scan

MEASURE_VERSION = 2
"""Raised when what a stage measures changes: no older counts are then reused."""

RunMeasure = Callable[[str, Sequence[MeasureTask]], None]


@dataclass
class StageRun:
    """Runs the stages of a method over a plan, one after the other; each sees what the ones before
    it found.
    """

    plan: MergePlan
    method: Method
    numbers: dict[str, Numbers]
    """By tensor, the parameters that hold for it."""
    surveys: Sequence[SurveyTask]
    thresholds: Thresholds
    run_measure: RunMeasure
    store: Store
    config: Mapping[str, Any]
    """The base's configuration, of its language model."""
    fresh: bool
    known: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    """By tensor, what has been found so far."""

    def run(self) -> dict[str, Known]:
        """Return what all stages found, by tensor."""
        self.known = {
            tensor.name: {} for shard in self.plan.merge_shards for tensor in shard.tensors
        }
        recipe = self.plan.recipe
        for stage in self.method.stages(
            recipe.parameters, [expert.parameters for expert in recipe.experts]
        ):
            if stage.measures == "vectors":
                for name, more in self._vectors(stage).items():
                    self.known[name] |= more
                continue
            first = self._measure(stage, None)
            found = (
                self._sums(stage, first) if stage.measures == "sums" else self._ranks(stage, first)
            )
            for name, values in self.known.items():
                values |= found[name if stage.scope == "tensor" else ""]
        return dict(self.known)

    def rescalers(self) -> tuple[float, ...] | None:
        """Return the factors of the experts that follow from what was found."""
        tensors = [
            TensorKnown(name, sum(piece.num_entries for piece in self._pieces(name)), known)
            for name, known in self.known.items()
        ]
        return self.method.rescalers(tensors, num_experts=len(self.plan.recipe.experts))

    def _pieces(self, group: str) -> list[TensorTask]:
        """Return the pieces of one tensor, or of the model under the empty name."""
        return [
            tensor
            for shard in self.plan.merge_shards
            for tensor in shard.tensors
            if group in ("", tensor.name)
        ]

    def _groups(self, stage: Stage) -> list[str]:
        return list(self.known) if stage.scope == "tensor" else [""]

    def _sums(
        self, stage: Stage, counts: dict[str, SparseHistogram]
    ) -> dict[str, dict[str, tuple[float, ...]]]:
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for group in self._groups(stage):
            pieces = [piece_name(piece.name, piece.row_start) for piece in self._pieces(group)]
            found[group] = {
                quantity: (to_sum(_add(counts, pieces, quantity, NUM_SUM_BINS)),)
                for quantity in _quantities(counts, pieces)
            }
        return found

    def _ranks(
        self, stage: Stage, counts: dict[str, SparseHistogram]
    ) -> dict[str, dict[str, tuple[float, ...]]]:
        wanted: dict[str, dict[str, list[tuple[int, int]]]] = {}
        for group in self._groups(stage):
            tensors = self._pieces(group)
            pieces = [piece_name(piece.name, piece.row_start) for piece in tensors]
            wanted[group] = {}
            for quantity in _quantities(counts, pieces):
                total = _add(counts, pieces, quantity, NUM_RANK_BINS)
                ranks = self._ask_ranks(stage, quantity, tensors, num_entries=int(total.sum()))
                wanted[group][quantity] = [find_bin(total, rank) for rank in ranks]
        refined = self._measure(stage, wanted)
        found = {}
        for group, quantities in wanted.items():
            pieces = [piece_name(piece.name, piece.row_start) for piece in self._pieces(group)]
            found[group] = {
                quantity: tuple(
                    to_ranked(
                        high,
                        find_bin(_add(refined, pieces, f"{quantity}#{high}", NUM_RANK_BINS), rest)[
                            0
                        ],
                    )
                    for high, rest in bins
                )
                for quantity, bins in quantities.items()
            }
        return found

    def _vectors(self, stage: Stage) -> Mapping[str, Known]:
        """Return what follows from the vectors of all tensors; those of a tensor's pieces are added
        in the order of the pieces.
        """
        found: dict[str, Any] = {}
        for survey in self._look(stage, None):
            found |= survey.vectors
        tensors = []
        for name in self.known:
            total: dict[str, torch.Tensor] = {}
            for piece in self._pieces(name):
                prefix = f"{piece_name(piece.name, piece.row_start)}:"
                for key, values in found.items():
                    if key.startswith(prefix):
                        quantity, vector = key.removeprefix(prefix), torch.from_numpy(values)
                        total[quantity] = total[quantity] + vector if quantity in total else vector
            parameters, _ = parse_numbers(self.method, self.numbers[name])
            tensors.append(TensorVectors(name, self._pieces(name)[0].shape, total, parameters))
        recipe = self.plan.recipe
        experts = [expert.parameters for expert in recipe.experts]
        return self.method.resolve_vectors(
            tensors, recipe.parameters, experts, stage=stage.name, config=self.config
        )

    def _ask_ranks(
        self, stage: Stage, quantity: str, tensors: Sequence[TensorTask], *, num_entries: int
    ) -> tuple[int, ...]:
        """Return the ranks that the method wants over these tensors, whose numbers must agree on
        them.
        """
        distinct = {
            id(numbers): numbers for numbers in (self.numbers[tensor.name] for tensor in tensors)
        }
        asked = set()
        for numbers in distinct.values():
            parameters, experts = parse_numbers(self.method, numbers)
            asked.add(
                self.method.ranks(
                    parameters,
                    experts,
                    stage=stage.name,
                    quantity=quantity,
                    num_entries=num_entries,
                )
            )
        if len(asked) > 1:
            raise RecipeError(
                f"{self.method.name}: a number that decides {stage.name!r} differs between tensors, but it is taken over the whole model. "
                "Add 'scope: tensor', or give one number"
            )
        return asked.pop()

    def _measure(
        self, stage: Stage, wanted: dict[str, dict[str, list[tuple[int, int]]]] | None
    ) -> dict[str, SparseHistogram]:
        """Return the counts of one pass over all shards, by "piece:quantity"."""
        counts: dict[str, SparseHistogram] = {}
        for survey in self._look(stage, wanted):
            counts |= survey.histograms
        return counts

    def _look(
        self, stage: Stage, wanted: dict[str, dict[str, list[tuple[int, int]]]] | None
    ) -> list[ScanResult]:
        """Return what one pass over all shards found."""
        surveys = {survey.shard: survey for survey in self.surveys}
        tasks = []
        for shard, thresholds in zip(self.plan.merge_shards, self.thresholds, strict=True):
            high_bins = None
            if wanted is not None:
                groups = [
                    wanted[tensor.name if stage.scope == "tensor" else ""]
                    for tensor in shard.tensors
                ]
                high_bins = tuple(
                    {
                        name: tuple(sorted({high for high, _ in bins}))
                        for name, bins in group.items()
                    }
                    for group in groups
                )
            numbers = tuple(self.numbers[tensor.name] for tensor in shard.tensors)
            known = tuple(dict(self.known[tensor.name]) for tensor in shard.tensors)
            identity: list[Any] = [
                MEASURE_VERSION, surveys[shard.name].key, self.method.name, stage.name, self.plan.dtype,
                [[number.parameters, list(number.experts)] for number in numbers], [expert.name for expert in self.plan.recipe.experts],
                [[value.hex() for value in row] for row in thresholds], [to_hex(values) for values in known],
                None if high_bins is None else [{name: list(bins) for name, bins in row.items()} for row in high_bins],
            ]  # fmt: skip
            tasks.append(
                MeasureTask(
                    key=digest_json(identity), shard=shard.name, expert_names=tuple(expert.name for expert in self.plan.recipe.experts),
                    tensors=shard.tensors, thresholds=thresholds, numbers=numbers, known=known, method=self.method.name, stage=stage.name,
                    measures=stage.measures, high_bins=high_bins, dtype=self.plan.dtype,
                    block_entries=self.plan.block_entries, num_bytes=shard.bytes_in, peak_bytes=shard.peak_bytes, fresh=self.fresh,
                )
            )  # fmt: skip
        self.run_measure(stage.name if wanted is None else f"{stage.name} (exact)", tasks)
        surveyed = []
        for task in tasks:
            found = read_scan(self.store, task.key)
            if found is None:
                raise MmergeError(
                    f"{self.store.uri}: what {stage.name} found of {task.shard} is damaged or gone. Run again with --fresh"
                )
            surveyed.append(found)
        return surveyed


def to_hex(known: Known) -> dict[str, list[str]]:
    """Return found numbers as text that keeps every bit."""
    return {quantity: [value.hex() for value in values] for quantity, values in known.items()}


def _quantities(counts: dict[str, SparseHistogram], pieces: Sequence[str]) -> list[str]:
    prefix = f"{pieces[0]}:"
    return sorted(name[len(prefix) :] for name in counts if name.startswith(prefix))


def _add(
    counts: dict[str, SparseHistogram], pieces: Sequence[str], quantity: str, num_bins: int
) -> Counts:
    empty = (np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int64))
    return add_sparse(
        (counts.get(f"{piece}:{quantity}", empty) for piece in pieces), num_bins=num_bins
    )
