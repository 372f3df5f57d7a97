"""Runs any task against the store at a URI."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace

from mmerge.manifests.errors import StoreUnavailable
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.workers.checkpoints.input_digests import InputChanged
from mmerge.workers.runtime.cores import one_thread
from mmerge.workers.task import (
    AnswerTask,
    CopyTask,
    MeasureTask,
    MergeTask,
    OnePassTask,
    RefineTask,
    ScanTask,
    Task,
    TaskResult,
)
from mmerge.workers.tasks.copy import copy_shard
from mmerge.workers.tasks.measure import measure_shard
from mmerge.workers.tasks.merge import merge_shard
from mmerge.workers.tasks.one_pass import scan_and_merge
from mmerge.workers.tasks.scan import refine_shard, scan_shard

log = logging.getLogger("mmerge.run")
ATTEMPTS = 3
"""Attempts while the store is unavailable; partly written objects have no name."""


def run_task(task: Task, store_uri: str, *, commits: bool = True) -> TaskResult:
    """Run one task and return its result, which is small; tensors and histograms go to the store.

    Args:
        task: the task.
        store_uri: the store that it writes to.
        commits: wait until all files are on the disk; otherwise the driver commits the result's
            `deferred_commits`.
    """
    with one_thread():
        for attempt in range(1, ATTEMPTS):
            try:
                return _attempt(task, store_uri, commits=commits)
            except StoreUnavailable as error:
                log.warning("%s: attempt %d failed, trying again: %s", task.shard, attempt, error)
                time.sleep(random.uniform(0.2, 1.0) * 2**attempt)
        return _attempt(task, store_uri, commits=commits)


def _attempt(task: Task, store_uri: str, *, commits: bool) -> TaskResult:
    store = open_store(store_uri)
    start_time = time.monotonic()
    try:
        if commits:
            return _run(task, store)
        with store.defer_commits() as deferred:
            result = _run(task, store)
            return replace(result, deferred_commits=tuple(deferred))
    except InputChanged as error:
        # A result and no error: the driver scans the inputs again, and decides.
        seconds = time.monotonic() - start_time
        return TaskResult(task.shard, 0, False, seconds, changed_input=error.change)


def _run(task: Task, store: Store) -> TaskResult:
    match task:
        case ScanTask():
            return scan_shard(task, store)
        case RefineTask():
            return refine_shard(task, store)
        case MeasureTask():
            return measure_shard(task, store)
        case OnePassTask():
            return scan_and_merge(task, store)
        case MergeTask():
            return merge_shard(task, store)
        case CopyTask():
            return copy_shard(task, store)
        case AnswerTask():
            # Imported here: transformers takes seconds to import, and no build needs it.
            from mmerge.workers.tasks.answer import answer_prompts

            return answer_prompts(task, store)
