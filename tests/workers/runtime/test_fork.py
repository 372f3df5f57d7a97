"""Thread pools of the process work in a process that is forked from it."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from mmerge.manifests.stores.local_writer import _writing_threads
from mmerge.manifests.stores.prefetch import _pool
from mmerge.workers.reconstruction.masked_weights import _threads


@pytest.mark.parametrize(
    "open_pool",
    [_writing_threads, _pool, lambda: _threads(1)],
    ids=["writing", "reading", "weights"],
)
def test_a_pool_that_was_used_before_a_fork_runs_tasks_after_it(
    open_pool: Callable[[], ThreadPoolExecutor],
) -> None:
    open_pool().submit(int).result(timeout=10)
    child = multiprocessing.get_context("fork").Process(
        target=lambda: open_pool().submit(int).result(timeout=5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join(timeout=20)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 0, "the forked process waits for threads that it does not have"
