"""What may begin before all inputs are surveyed: a shard's own merge, as soon as its survey says
all that the merge depends on.

The merge then finds its inputs in the page cache, also where they are larger than memory, and the
storage writes from the first shard on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from mmerge.manifests.stores.object_store import Store
from mmerge.pipeline.build.input_survey import (
    InputSurvey,
    Thresholds,
    ThresholdSearch,
    read_task_survey,
)
from mmerge.pipeline.build.task_factory import make_copy_task, make_merge_task
from mmerge.pipeline.planning.plan import MergePlan, MergeShard
from mmerge.workers.methods import find_method
from mmerge.workers.methods.interface import Known, Trimming
from mmerge.workers.task import CopyTask, MergeTask, RefineTask, SurveyTask, Task
from mmerge.workers.tasks.scan_cache import SparseHistogram

FlowTask = TypeVar("FlowTask", MergeTask, CopyTask)


class Flow:
    """Takes the surveys of a plan as they are finished, and says which tasks follow.

    A merge follows its own survey unless it depends on others: on thresholds or stages over the
    whole model, or on a tensor of which other shards hold rows. A copy follows as soon as all that
    it holds is surveyed. What does not follow is left to the phases that come after.

    Args:
        plan: what is built.
        surveys: all survey tasks of the plan.
        trimmings: by tensor what is kept; None for methods that do not trim.
        store: holds what surveys find.
        fresh: compute everything again, whatever is in the store.
    """

    def __init__(
        self,
        plan: MergePlan,
        surveys: Sequence[SurveyTask],
        trimmings: Mapping[str, Trimming] | None,
        store: Store,
        *,
        fresh: bool,
    ) -> None:
        self.survey = InputSurvey(
            pooled=any(trimming.scope == "model" for trimming in (trimmings or {}).values())
        )
        """What is known so far."""
        self._plan, self._trimmings, self._store, self._fresh = plan, trimmings, store, fresh
        self._surveys = {task.shard: task for task in surveys}
        self._taken: set[str] = set()
        self._experts = {shard.name: shard.expert for shard in plan.copy_shards}
        self._mergeable = {
            shard.name: shard for shard in plan.merge_shards if self._stands_alone(shard)
        }
        self._waiting_copies = {shard.name: shard for shard in plan.copy_shards}
        self._searches: dict[str, ThresholdSearch] = {}
        self._thresholds: dict[str, tuple[tuple[float, ...], ...]] = {}
        self._begun: set[str] = set()

    def _stands_alone(self, shard: MergeShard) -> bool:
        recipe = self._plan.recipe
        if find_method(recipe.method).stages(
            recipe.parameters, [expert.parameters for expert in recipe.experts]
        ):
            return False
        if not self._trimmings:
            return True
        if any(self._trimmings[tensor.name].scope == "model" for tensor in shard.tensors):
            return False
        rows: dict[str, int] = {}
        for tensor in shard.tensors:
            rows[tensor.name] = rows.get(tensor.name, 0) + tensor.row_stop - tensor.row_start
        return all(rows[tensor.name] == tensor.num_rows for tensor in shard.tensors)

    def follow(self, task: Task) -> Sequence[RefineTask | MergeTask | CopyTask]:
        """Return what may begin now that this task is finished."""
        if isinstance(task, RefineTask) and task.shard in self._searches:
            return self._merge(task.shard, self._searches.pop(task.shard), [task])
        if not isinstance(task, SurveyTask):
            return []
        self._take(task)
        return [*self._refine_or_merge(task), *self._copy()]

    def _take(self, task: SurveyTask) -> None:
        self.survey.add(
            task, read_task_survey(self._store, task), expert=self._experts.get(task.shard, "")
        )
        self._taken.add(task.key)

    def _refine_or_merge(self, task: SurveyTask) -> Sequence[RefineTask | MergeTask]:
        shard = self._mergeable.get(task.shard)
        if shard is None:
            return []
        search = ThresholdSearch([shard], [task], self.survey, self._trimmings)
        refine = search.refine_tasks()
        if refine:
            self._searches[shard.name] = search
            return refine
        return self._merge(shard.name, search, [])

    def _merge(
        self, name: str, search: ThresholdSearch, refined: Sequence[RefineTask]
    ) -> list[MergeTask]:
        shard = self._mergeable[name]
        self._thresholds[name] = search.finish(self._read_refined(refined))[0]
        for tensor in shard.tensors:
            self.survey.forget_histograms(tensor)
        known: dict[str, Known] = {tensor.name: {} for tensor in shard.tensors}
        return self._new(
            make_merge_task(
                self._plan, shard, self.survey, self._thresholds[name], known, fresh=self._fresh
            )
        )

    def _copy(self) -> list[CopyTask]:
        ready = [shard for shard in self._waiting_copies.values() if self.survey.knows(shard)]
        for shard in ready:
            del self._waiting_copies[shard.name]
        return [
            task
            for shard in ready
            for task in self._new(make_copy_task(self._plan, shard, self.survey, fresh=self._fresh))
        ]

    def _new(self, task: FlowTask) -> list[FlowTask]:
        """Return the task, or nothing where another shard has the same object."""
        if task.digest in self._begun:
            return []
        self._begun.add(task.digest)
        return [task]

    def _read_refined(self, tasks: Sequence[RefineTask]) -> Iterator[dict[str, SparseHistogram]]:
        return (read_task_survey(self._store, task).histograms for task in tasks)

    def finish(self, run_refine: Callable[[Sequence[RefineTask]], None]) -> Thresholds:
        """Return the thresholds of all shards, once all surveys are in the store: `survey` then
        knows all inputs.

        Args:
            run_refine: runs the second passes over shards that did not follow.

        Raises:
            RecipeError: the densities differ between tensors, though the threshold is taken over
                the whole model.
            MmergeError: a survey is missing or damaged.
        """
        for task in self._surveys.values():
            if task.key not in self._taken:
                self._take(task)
        left = [shard for shard in self._plan.merge_shards if shard.name not in self._thresholds]
        search = ThresholdSearch(
            left, [self._surveys[shard.name] for shard in left], self.survey, self._trimmings
        )
        refine = search.refine_tasks()
        if self._trimmings:
            run_refine(refine)
        found = search.finish(self._read_refined(refine))
        self._thresholds |= {shard.name: values for shard, values in zip(left, found, strict=True)}
        return tuple(self._thresholds[shard.name] for shard in self._plan.merge_shards)
