"""Run any task on the store at a URI."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace

from mmerge.manifests.errors import StoreUnavailable
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.workers.runtime.cores import one_thread
from mmerge.workers.task import (
    AnswerTask,
    MeasureTask,
    MergeTask,
    RefineTask,
    SurveyTask,
    Task,
    TaskResult,
)
from mmerge.workers.tasks.copy import copy_shard
from mmerge.workers.tasks.measure import measure_shard
from mmerge.workers.tasks.merge import merge_shard
from mmerge.workers.tasks.scan import refine_shard, scan_shard

log = logging.getLogger("mmerge.run")
ATTEMPTS = 3
"""How often a task is begun when the store breaks off; a half-written object has no name, so it can
simply begin again.
"""


def run_task(task: Task, store_uri: str, *, settles: bool = True) -> TaskResult:
    """Return the result of one task; whatever is large lies in the store.

    Args:
        task: what is done.
        store_uri: where its result goes.
        settles: wait until it is on the disk; otherwise `Store.commit` does, with the result's
            `pending`.
    """
    with one_thread():
        for attempt in range(1, ATTEMPTS):
            try:
                return _attempt(task, store_uri, settles=settles)
            except StoreUnavailable as error:
                log.warning("%s: begins again: %s", task.shard, error)
                time.sleep(random.uniform(0.2, 1.0) * 2**attempt)
        return _attempt(task, store_uri, settles=settles)


def _attempt(task: Task, store_uri: str, *, settles: bool) -> TaskResult:
    store = open_store(store_uri)
    if settles:
        return _run(task, store)
    with store.defer_commits() as deferred:
        result = _run(task, store)
        return replace(result, pending=tuple(deferred))


def _run(task: Task, store: Store) -> TaskResult:
    if isinstance(task, SurveyTask):
        return scan_shard(task, store)
    if isinstance(task, RefineTask):
        return refine_shard(task, store)
    if isinstance(task, MeasureTask):
        return measure_shard(task, store)
    if isinstance(task, MergeTask):
        return merge_shard(task, store)
    if isinstance(task, AnswerTask):
        from mmerge.workers.tasks.answer import (
            answer_prompts,  # transformers takes seconds to import; merging does not need it
        )

        return answer_prompts(task, store)
    return copy_shard(task, store)
