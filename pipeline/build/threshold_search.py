"""Exact trim thresholds of the shards that share them, from the histograms of their scans.

The histograms of the scan give the bin in which each threshold lies. Where a bin holds several
magnitudes, a second pass over that expert counts the lower bits within it. Scope `model` adds the
histograms of all tensors, scope `tensor` those of the pieces of one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mmerge.manifests.digest import digest_json
from mmerge.manifests.errors import RecipeError
from mmerge.pipeline.build.input_scan import InputDigests
from mmerge.pipeline.build.shard_builds import Barrier
from mmerge.pipeline.planning.shards import MergeShard
from mmerge.workers.methods.interface import Trimming
from mmerge.workers.statistics.magnitude_histograms import (
    NUM_LOWER,
    Histogram,
    HistogramSum,
    add_histograms,
    find_bin,
    is_exact,
    to_magnitude,
)
from mmerge.workers.statistics.order_statistics import trim_rank
from mmerge.workers.task import RefineTask, ScanTask, TensorTask
from mmerge.workers.tasks.scan_cache import SparseHistogram, piece_name

Thresholds = tuple[tuple[float, ...], ...]
"""Of one shard, per piece and expert; empty per piece for methods that do not trim."""
Key = tuple[str, int]
"""What a threshold is taken over: a tensor ("" for the whole model), and an expert's position."""


class ThresholdSearch:
    """The trim thresholds of some shards. Holds histograms only until the bins are found.

    Each shard calls `add`, waits at `located`, and asks `make_refine_task`. Where `is_exact` is
    False it runs that task, calls `add_refined` and waits at `refined`. Then `thresholds` answers.

    Raises:
        RecipeError: densities differ between tensors, though the scope is the whole model.
    """

    def __init__(self, shards: Sequence[MergeShard], trimmings: Mapping[str, Trimming]) -> None:
        """Prepare a search over the shards that share thresholds, by tensor what is trimmed."""
        first = trimmings[shards[0].tensors[0].name]
        self._scope = first.scope
        if self._scope == "model" and any(value != first for value in trimmings.values()):
            raise RecipeError(
                "density: differs between tensors, but the threshold is taken over the whole"
                " model. Add 'scope: tensor'"
            )
        self._num_entries: dict[str, int] = {}
        self._trimming_of: dict[str, Trimming] = {}
        for shard in shards:
            for tensor in shard.tensors:
                group = self._group_of(tensor)
                self._num_entries[group] = self._num_entries.get(group, 0) + tensor.num_entries
                self._trimming_of.setdefault(group, trimmings[tensor.name])
        self._sums: dict[Key, HistogramSum] = {}
        self._pieces: dict[Key, list[Histogram]] = {}
        self._values: dict[Key, float] = {}
        self._bins: dict[Key, tuple[int, int]] = {}
        self.located = Barrier(len(shards), self._locate)
        self.refined = Barrier(len(shards), self._refine)

    @property
    def is_exact(self) -> bool:
        """Whether the histograms of the scans give all thresholds; known after `located`."""
        return not self._bins

    @property
    def num_histograms(self) -> int:
        """Histograms, and sums of histograms, that are held at present."""
        return len(self._sums) + sum(len(pieces) for pieces in self._pieces.values())

    def add(self, shard: MergeShard, histograms: Mapping[str, SparseHistogram]) -> None:
        """Add the histograms of a shard's scan."""
        for key, name in self._keys(shard.tensors):
            if self._scope == "model":
                # Summed at once: the histograms of all tensors of a large model fill the memory.
                self._sums.setdefault(key, HistogramSum()).add(histograms[name])
            else:
                self._pieces.setdefault(key, []).append(histograms[name])

    def make_refine_task(self, scan: ScanTask, digests: InputDigests) -> RefineTask | None:
        """Return the second pass that the search needs over the inputs of a scan, if any.

        Args:
            scan: the scan of a shard.
            digests: what it found; the result is kept for these bytes alone.
        """
        bins = []
        num_bytes = 0
        for tensor in scan.tensors:
            row: list[int | None] = []
            for position, expert in enumerate(tensor.experts):
                located = self._bins.get((self._group_of(tensor), position))
                row.append(None if located is None else located[0])
                if located is not None:
                    num_bytes += tensor.base.spec.num_bytes + expert.spec.num_bytes
            bins.append(tuple(row))
        if not num_bytes:
            return None
        input_digests = digests.of_tensors(scan.tensors)
        return RefineTask(
            key=digest_json([scan.key, input_digests, bins]),
            shard=scan.shard,
            expert_names=scan.expert_names,
            tensors=scan.tensors,
            input_digests=input_digests,
            bins=tuple(bins),
            block_entries=scan.block_entries,
            num_bytes=num_bytes,
            peak_bytes=scan.peak_bytes,
            fresh=scan.fresh,
            input_checksums=digests.checksums_of(scan.tensors),
        )

    def add_refined(self, shard: MergeShard, histograms: Mapping[str, SparseHistogram]) -> None:
        """Add what a shard's refine task counted."""
        for key, name in self._keys(shard.tensors):
            if key in self._bins and name in histograms:
                self._sums.setdefault(key, HistogramSum(NUM_LOWER)).add(histograms[name])

    def thresholds(self, shard: MergeShard) -> Thresholds:
        """Return the thresholds of a shard; 0 where everything is kept."""
        return tuple(
            tuple(
                self._values.get((self._group_of(tensor), position), 0.0)
                for position in range(len(tensor.experts))
            )
            for tensor in shard.tensors
        )

    def _group_of(self, tensor: TensorTask) -> str:
        return tensor.name if self._scope == "tensor" else ""

    def _keys(self, tensors: Sequence[TensorTask]) -> Iterator[tuple[Key, str]]:
        """Yield per piece and expert the threshold's key and the histogram's name in a scan."""
        for tensor in tensors:
            for position in range(len(tensor.experts)):
                name = f"{piece_name(tensor.name, tensor.row_start)}:{position}"
                yield (self._group_of(tensor), position), name

    def _locate(self) -> None:
        """Find the bin of every threshold, and its value where the bin holds one magnitude."""
        for key in [*self._sums, *self._pieces]:
            group, position = key
            trimming = self._trimming_of[group]
            rank = trim_rank(
                self._num_entries[group],
                trimming.densities[position],
                rounding=trimming.rounding,
            )
            if not rank:
                continue
            bin_number, rank_in_bin = find_bin(self._histogram(key), rank)
            if is_exact(bin_number):
                self._values[key] = to_magnitude(bin_number)
            else:
                self._bins[key] = (bin_number, rank_in_bin)
        self._sums.clear()
        self._pieces.clear()

    def _histogram(self, key: Key) -> Histogram:
        if key in self._sums:
            return self._sums[key].histogram()
        return add_histograms(self._pieces[key])

    def _refine(self) -> None:
        for key, (bin_number, rank_in_bin) in self._bins.items():
            lower, _ = find_bin(self._sums[key].histogram(), rank_in_bin)
            self._values[key] = to_magnitude(bin_number, lower)
        self._sums.clear()
