"""Run any task on the store at a URI."""

from __future__ import annotations

from mmerge.manifests.store import Store, open_store
from mmerge.workers.copy import copy_shard
from mmerge.workers.measure import measure_shard
from mmerge.workers.merge import merge_shard
from mmerge.workers.survey import refine_shard, survey_shard
from mmerge.workers.task import MeasureTask, MergeTask, RefineTask, SurveyTask, Task, TaskResult
from mmerge.workers.threads import one_thread


def run_task(task: Task, store_uri: str) -> TaskResult:
    """Return the result of one task; whatever is large lies in the store."""
    with one_thread():
        return _run(task, open_store(store_uri))


def _run(task: Task, store: Store) -> TaskResult:
    if isinstance(task, SurveyTask):
        return survey_shard(task, store)
    if isinstance(task, RefineTask):
        return refine_shard(task, store)
    if isinstance(task, MeasureTask):
        return measure_shard(task, store)
    if isinstance(task, MergeTask):
        return merge_shard(task, store)
    return copy_shard(task, store)
