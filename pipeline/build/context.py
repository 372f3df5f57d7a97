"""What the builds of all shards of a plan share: scan tasks, digests, thresholds, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmerge.pipeline.build.changed_inputs import Rescans
from mmerge.pipeline.build.input_scan import InputDigests, make_scan_tasks, share_rows
from mmerge.pipeline.build.method_stages import MethodStages
from mmerge.pipeline.build.threshold_search import Thresholds, ThresholdSearch
from mmerge.pipeline.planning.memory_bounds import MAX_HELD_BYTES, process_bytes
from mmerge.pipeline.planning.plan import MergePlan, read_identities
from mmerge.pipeline.planning.shards import CopyShard, MergeShard
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Trimming, parse_parameters
from mmerge.workers.task import ScanTask, TensorTask


class BuildContext:
    """The shared state of one build: driven by a run, by a forecast or by a simulation.

    Raises:
        RecipeError: densities differ between tensors, though the scope is the whole model.
    """

    def __init__(
        self,
        plan: MergePlan,
        *,
        fresh: bool,
        one_pass: bool = False,
        rescans: Rescans | None = None,
    ) -> None:
        """Prepare the build of a plan.

        Args:
            plan: what is built.
            fresh: ignore whatever the store has.
            one_pass: scan and merge in one pass where that is possible.
            rescans: what earlier passes of the same run found to have changed.
        """
        self.plan = plan
        self._one_pass = one_pass
        self.rescans = rescans or Rescans(plan)
        self.fresh = fresh
        self.method = find_method(plan.recipe.method)
        self.digests = InputDigests()
        self._trimmings = self._make_trimmings()
        densities = [trimming.densities for trimming in self._trimmings.values()]
        self._keeps_all = bool(densities) and all(set(values) == {1} for values in densities)
        """Whether the method trims, but nothing of these experts: all thresholds are 0."""
        if self._keeps_all:
            self._trimmings = {}
        self.identities = read_identities(plan.checkpoints)
        scan_tasks = make_scan_tasks(
            plan, self.identities, magnitudes=bool(self._trimmings), fresh=fresh
        )
        self.scan_tasks = {name: self._distrust(task) for name, task in scan_tasks.items()}
        groups = group_by_tensor(plan.merge_shards)
        self.searches = self._make_searches(groups)
        """By merge shard; empty for methods that do not trim."""
        self.stages = MethodStages(
            plan,
            self.method,
            groups=groups,
            digests=self.digests,
            config=plan.checkpoints[0].text_config,
            fresh=fresh,
        )
        self._merged_pieces: dict[str, list[tuple[TensorTask, ScanTask]]] = {}
        """By tensor, its merged pieces with the scan of each."""
        for shard in plan.merge_shards:
            for tensor in shard.tensors:
                pieces = self._merged_pieces.setdefault(tensor.name, [])
                pieces.append((tensor, self.scan_tasks[shard.name]))

    @property
    def phases(self) -> list[str]:
        """The names of all phases that tasks of this build may belong to, in their order."""
        thresholds = ["thresholds"] if self.searches else []
        return ["scan", *thresholds, *self.stages.phases, "merge", "copy"]

    def scans_of(self, shard: CopyShard) -> list[ScanTask]:
        """Return the scans that a copy depends on, including those of merged tensors it holds."""
        tasks = {}
        if shard.name in self.scan_tasks:
            tasks[shard.name] = self.scan_tasks[shard.name]
        for tensor in shard.tensors if shard.role == "base" else ():
            # A copy may hold rows of several merged pieces, and begin or end within one.
            for piece, scan in self._merged_pieces.get(tensor.name, ()):
                if share_rows(piece, tensor):
                    tasks[scan.shard] = scan
        return list(tasks.values())

    def thresholds_without_search(self, shard: MergeShard) -> Thresholds:
        """Return the thresholds of a shard that has no search: 0, or none where nothing trims."""
        return tuple(
            (0.0,) * len(tensor.experts) if self._keeps_all else () for tensor in shard.tensors
        )

    def merges_in_one_pass(self, shard: MergeShard) -> bool:
        """Return whether a shard is scanned and merged in the same pass over its inputs.

        That takes a method that needs no thresholds, no statistics and no whole tensor beforehand,
        and memory for the object. After a change of the inputs they are read twice, and compared.
        """
        if not self._one_pass or self.rescans.is_any or shard.name in self.searches:
            return False
        if self.stages.passes_of(shard) or shard.bytes_out > MAX_HELD_BYTES:
            return False
        if any(tensor.granularity == "tensor" for tensor in shard.tensors):
            return False
        limit = self.plan.memory_bytes
        return limit is None or process_bytes([shard.peak_bytes + shard.bytes_out]) <= limit

    def _distrust(self, task: ScanTask) -> ScanTask:
        """Return a scan that is run whatever the store has, if its files ask for that."""
        if self.rescans.may_be_stored((uri, file) for uri, file, _ in task.identities):
            return task
        return replace(task, fresh=True)

    def _make_trimmings(self) -> dict[str, Trimming]:
        """Return by tensor what is trimmed; empty for methods that do not."""
        trimmings = {}
        for name, parameters in self.plan.method_parameters.items():
            trimming = self.method.trimming(*parse_parameters(self.method, parameters))
            if trimming is not None:
                trimmings[name] = trimming
        return trimmings

    def _make_searches(self, groups: Sequence[Sequence[MergeShard]]) -> dict[str, ThresholdSearch]:
        if not self._trimmings:
            return {}
        scopes = {trimming.scope for trimming in self._trimmings.values()}
        searches: dict[str, ThresholdSearch] = {}
        for shards in groups if scopes == {"tensor"} else [self.plan.merge_shards]:
            search = ThresholdSearch(shards, self._trimmings)
            searches |= {shard.name: search for shard in shards}
        return searches


def group_by_tensor(shards: Sequence[MergeShard]) -> list[list[MergeShard]]:
    """Return the shards in groups that hold rows of the same tensors; most are alone in theirs."""
    groups: dict[str, dict[str, MergeShard]] = {}
    for shard in shards:
        members: dict[str, MergeShard] = {}
        for tensor in shard.tensors:
            members |= groups.get(tensor.name, {})
        members[shard.name] = shard
        for member in members.values():
            groups |= {tensor.name: members for tensor in member.tensors}
    distinct = {id(members): members for members in groups.values()}
    return [list(members.values()) for members in distinct.values()]
