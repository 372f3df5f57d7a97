"""The statistics passes of a method: their tasks, and the results that follow from their counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.build.input_scan import InputDigests
from mmerge.pipeline.build.shard_builds import Barrier
from mmerge.pipeline.build.threshold_search import Thresholds
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.shards import MergeShard
from mmerge.workers.methods.interface import (
    Measured,
    Method,
    Stage,
    TensorMeasurements,
    identify_parameters,
    parse_parameters,
)
from mmerge.workers.statistics.exact_sums import NUM_RANK_BINS, NUM_SUM_BINS, to_ranked, to_sum
from mmerge.workers.statistics.order_statistics import Counts, add_sparse, find_bin
from mmerge.workers.task import MeasureTask, ScanTask, TensorTask
from mmerge.workers.tasks.scan_cache import ScanResult, SparseHistogram, piece_name

MEASURE_VERSION = 3
"""Raised when the contents of a stored stage pass change: no older one is then reused."""

RankBins = dict[str, list[tuple[int, int]]]
"""By quantity, the bin of every rank, and the rank within that bin."""


class CountPool:
    """Counts by group (a tensor, or "" for the whole model) and quantity.

    Counts of the whole model are summed as they arrive, those of a tensor when they are asked for:
    one dense array per tensor and quantity would take more than the sparse counts of its pieces.
    """

    def __init__(self, *, num_bins: int, is_summed: bool) -> None:
        self._num_bins = num_bins
        self._is_summed = is_summed
        self._sums: dict[str, dict[str, Counts]] = {}
        self._pieces: dict[str, dict[str, list[SparseHistogram]]] = {}

    def add(self, group: str, quantity: str, counts: SparseHistogram) -> None:
        """Add the counts of one piece."""
        if not self._is_summed:
            pieces = self._pieces.setdefault(group, {})
            pieces.setdefault(quantity, []).append(counts)
            return
        sums = self._sums.setdefault(group, {})
        if quantity not in sums:
            sums[quantity] = np.zeros(self._num_bins, dtype=np.int64)
        bins, bin_counts = counts
        sums[quantity][bins] += bin_counts

    def quantities(self, group: str) -> list[str]:
        """Return the names of the quantities of a group."""
        return sorted(self._sums.get(group) or self._pieces.get(group) or ())

    def total(self, group: str, quantity: str) -> Counts:
        """Return the summed counts of a quantity; all 0 where none were added."""
        if self._is_summed:
            empty = np.zeros(self._num_bins, dtype=np.int64)
            return self._sums.get(group, {}).get(quantity, empty)
        pieces: Iterable[Any] = self._pieces.get(group, {}).get(quantity, ())
        return add_sparse(pieces, num_bins=self._num_bins)

    def clear(self) -> None:
        """Free all counts."""
        self._sums.clear()
        self._pieces.clear()


class MethodStages:
    """All stages of a method over a plan, and what they have found by tensor.

    A stage of scope `tensor` is complete for a shard once its tensors are counted; one of scope
    `model` or of vectors is complete once all shards are.
    """

    def __init__(
        self,
        plan: MergePlan,
        method: Method,
        *,
        groups: Sequence[Sequence[MergeShard]],
        digests: InputDigests,
        config: Mapping[str, Any],
        fresh: bool,
    ) -> None:
        """Prepare the stages.

        Args:
            plan: what is built.
            method: the plan's.
            groups: shards that hold rows of the same tensors.
            digests: what the scans find, by the time a shard reaches its first stage.
            config: the base's configuration, of its language model.
            fresh: measure again, whatever is in the store.
        """
        recipe = plan.recipe
        self.plan, self.method, self.config, self.fresh = plan, method, config, fresh
        self.digests = digests
        self.stages = method.stages(
            recipe.parameters, [expert.parameters for expert in recipe.experts]
        )
        self.results: dict[str, dict[str, tuple[float, ...]]] = {
            tensor.name: {} for shard in plan.merge_shards for tensor in shard.tensors
        }
        self._passes: dict[str, list[StagePass]] = {shard.name: [] for shard in plan.merge_shards}
        for stage in self.stages:
            spans_model = stage.scope == "model" or stage.measures == "vectors"
            for shards in [plan.merge_shards] if spans_model else groups:
                stage_pass = StagePass(self, stage, shards)
                for shard in shards:
                    self._passes[shard.name].append(stage_pass)

    @property
    def phases(self) -> list[str]:
        """The names of all passes in their order."""
        names = []
        for stage in self.stages:
            names.append(stage.name)
            if stage.measures == "ranks":
                names.append(f"{stage.name} (exact)")
        return names

    def passes_of(self, shard: MergeShard) -> Sequence[StagePass]:
        """Return the stages of a shard in their order."""
        return self._passes[shard.name]

    def results_of(self, shard: MergeShard) -> tuple[Measured, ...]:
        """Return per piece of a shard what has been found of its tensor so far."""
        return tuple(dict(self.results[tensor.name]) for tensor in shard.tensors)

    def rescalers(self) -> tuple[float, ...] | None:
        """Return the factors of the experts that follow from all results, if the method has any."""
        num_entries = dict.fromkeys(self.results, 0)
        for shard in self.plan.merge_shards:
            for tensor in shard.tensors:
                num_entries[tensor.name] += tensor.num_entries
        tensors = [
            TensorMeasurements(name, num_entries[name], result)
            for name, result in self.results.items()
        ]
        return self.method.rescalers(tensors, num_experts=len(self.plan.recipe.experts))


class StagePass:
    """One stage of a method over the shards that share its results.

    Each shard runs `make_task`, calls `add` and waits at `measured`. A stage of ranks needs a
    second pass over the bins in which they lie: `make_exact_task`, `add_exact`, and `resolved`.
    """

    def __init__(self, stages: MethodStages, stage: Stage, shards: Sequence[MergeShard]) -> None:
        self.stage = stage
        self._stages = stages
        self._tensors: dict[str, list[TensorTask]] = {}
        for shard in shards:
            for tensor in shard.tensors:
                self._tensors.setdefault(tensor.name, []).append(tensor)
        is_summed = stage.scope == "model"
        num_bins = NUM_SUM_BINS if stage.measures == "sums" else NUM_RANK_BINS
        self._counts = CountPool(num_bins=num_bins, is_summed=is_summed)
        self._exact_counts = CountPool(num_bins=NUM_RANK_BINS, is_summed=is_summed)
        self._vectors: dict[str, dict[str, NDArray[np.float64]]] = {}
        self._rank_bins: dict[str, RankBins] = {}
        finish = {
            "sums": self._resolve_sums,
            "ranks": self._locate_ranks,
            "vectors": self._resolve_vectors,
        }
        self.measured = Barrier(len(shards), finish[stage.measures])
        self.resolved = Barrier(len(shards), self._resolve_ranks)

    def make_task(self, shard: MergeShard, scan: ScanTask, thresholds: Thresholds) -> MeasureTask:
        """Return the (first) pass over a shard; stages before this one are complete for it."""
        return self._make_task(shard, scan, thresholds, None)

    def make_exact_task(
        self, shard: MergeShard, scan: ScanTask, thresholds: Thresholds
    ) -> MeasureTask:
        """Return the second pass over a shard, once the bins of the ranks are known."""
        high_bins = []
        for tensor in shard.tensors:
            rank_bins = self._rank_bins[self._group_of(tensor)]
            high_bins.append(
                {
                    quantity: tuple(sorted({high for high, _ in bins}))
                    for quantity, bins in rank_bins.items()
                }
            )
        return self._make_task(shard, scan, thresholds, tuple(high_bins))

    def _make_task(
        self,
        shard: MergeShard,
        scan: ScanTask,
        thresholds: Thresholds,
        high_bins: tuple[dict[str, tuple[int, ...]], ...] | None,
    ) -> MeasureTask:
        plan, method = self._stages.plan, self._stages.method
        names = tuple(expert.name for expert in plan.recipe.experts)
        method_parameters = tuple(plan.method_parameters[tensor.name] for tensor in shard.tensors)
        earlier_results = self._stages.results_of(shard)
        input_digests = self._stages.digests.of_tensors(shard.tensors)
        identity: list[Any] = [
            MEASURE_VERSION,
            scan.key,
            input_digests,
            method.name,
            self.stage.name,
            plan.dtype,
            [identify_parameters(method, values) for values in method_parameters],
            list(names),
            [[value.hex() for value in row] for row in thresholds],
            [to_hex(values) for values in earlier_results],
            None if high_bins is None else [dict(row) for row in high_bins],
        ]
        return MeasureTask(
            key=digest_json(identity),
            shard=shard.name,
            expert_names=names,
            tensors=shard.tensors,
            input_digests=input_digests,
            thresholds=thresholds,
            method_parameters=method_parameters,
            earlier_results=earlier_results,
            method=method.name,
            stage=self.stage.name,
            measures=self.stage.measures,
            high_bins=high_bins,
            dtype=plan.dtype,
            block_entries=plan.block_entries,
            num_bytes=shard.bytes_in,
            peak_bytes=shard.peak_bytes,
            fresh=self._stages.fresh,
            input_checksums=self._stages.digests.checksums_of(shard.tensors),
        )

    def add(self, shard: MergeShard, result: ScanResult) -> None:
        """Add what the first pass over a shard counted, or its vectors."""
        self._add_counts(self._counts, shard, result)
        for name, vector in result.vectors.items():
            piece, _, quantity = name.rpartition(":")
            self._vectors.setdefault(piece, {})[quantity] = vector

    def add_exact(self, shard: MergeShard, result: ScanResult) -> None:
        """Add what the second pass over a shard counted."""
        self._add_counts(self._exact_counts, shard, result)

    def _add_counts(self, pool: CountPool, shard: MergeShard, result: ScanResult) -> None:
        groups = {
            piece_name(tensor.name, tensor.row_start): self._group_of(tensor)
            for tensor in shard.tensors
        }
        for name, counts in result.histograms.items():
            piece, _, quantity = name.rpartition(":")
            pool.add(groups[piece], quantity, counts)

    def _group_of(self, tensor: TensorTask) -> str:
        return tensor.name if self.stage.scope == "tensor" else ""

    def _groups(self) -> list[str]:
        return list(self._tensors) if self.stage.scope == "tensor" else [""]

    def _pieces_of(self, group: str) -> list[TensorTask]:
        if group:
            return self._tensors[group]
        return [piece for pieces in self._tensors.values() for piece in pieces]

    def _set_results(self, group: str, values: Mapping[str, tuple[float, ...]]) -> None:
        for name in [group] if group else self._tensors:
            self._stages.results[name].update(values)

    def _resolve_sums(self) -> None:
        for group in self._groups():
            sums = {
                quantity: (to_sum(self._counts.total(group, quantity)),)
                for quantity in self._counts.quantities(group)
            }
            self._set_results(group, sums)
        self._counts.clear()

    def _locate_ranks(self) -> None:
        """Find the bin of every rank that the method asks for."""
        for group in self._groups():
            rank_bins: RankBins = {}
            for quantity in self._counts.quantities(group):
                total = self._counts.total(group, quantity)
                ranks = self._ranks(group, quantity, num_entries=int(total.sum()))
                rank_bins[quantity] = [find_bin(total, rank) for rank in ranks]
            self._rank_bins[group] = rank_bins
        self._counts.clear()

    def _resolve_ranks(self) -> None:
        for group, rank_bins in self._rank_bins.items():
            values = {}
            for quantity, bins in rank_bins.items():
                ranked = []
                for high_bin, rank_in_bin in bins:
                    counts = self._exact_counts.total(group, f"{quantity}#{high_bin}")
                    ranked.append(to_ranked(high_bin, find_bin(counts, rank_in_bin)[0]))
                values[quantity] = tuple(ranked)
            self._set_results(group, values)
        self._exact_counts.clear()

    def _ranks(self, group: str, quantity: str, *, num_entries: int) -> tuple[int, ...]:
        """Return the ranks that the method asks for.

        Raises:
            RecipeError: the parameters of the group's tensors ask for different ranks.
        """
        method, plan = self._stages.method, self._stages.plan
        distinct = {}
        for tensor in self._pieces_of(group):
            parameters = plan.method_parameters[tensor.name]
            distinct[id(parameters)] = parameters
        ranks = set()
        for raw in distinct.values():
            parameters, experts = parse_parameters(method, raw)
            ranks.add(
                method.ranks(
                    parameters,
                    experts,
                    stage=self.stage.name,
                    quantity=quantity,
                    num_entries=num_entries,
                )
            )
        if len(ranks) > 1:
            raise RecipeError(
                f"{method.name}: a parameter of stage {self.stage.name!r} differs between tensors,"
                " but the stage spans the whole model. Add 'scope: tensor', or give one value"
            )
        return ranks.pop()

    def _resolve_vectors(self) -> None:
        """Let the method resolve the vectors of all tensors."""
        import torch  # importing it takes longer than many builds, and few methods have vectors

        from mmerge.workers.methods.interface import TensorVectors

        if not self._vectors:
            return  # a simulated pass has none
        method, plan = self._stages.method, self._stages.plan
        tensors = []
        for name, pieces in self._tensors.items():
            total: dict[str, torch.Tensor] = {}
            # In the order of the pieces: the last bit of a float64 sum depends on it.
            for piece in pieces:
                vectors = self._vectors.get(piece_name(piece.name, piece.row_start), {})
                for quantity, values in vectors.items():
                    vector = torch.from_numpy(values)
                    total[quantity] = total[quantity] + vector if quantity in total else vector
            parameters, _ = parse_parameters(method, plan.method_parameters[name])
            tensors.append(TensorVectors(name, pieces[0].shape, total, parameters))
        results = method.resolve_vectors(
            tensors,
            plan.recipe.parameters,
            [expert.parameters for expert in plan.recipe.experts],
            stage=self.stage.name,
            config=self._stages.config,
        )
        for name, result in results.items():
            self._stages.results[name].update(result)
        self._vectors.clear()


def to_hex(results: Measured) -> dict[str, list[str]]:
    """Return the results of stages as text that keeps every bit."""
    return {quantity: [value.hex() for value in values] for quantity, values in results.items()}
