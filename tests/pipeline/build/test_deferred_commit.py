"""Deferred commits: workers go on, nothing counts as done before its commit, results are kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import StoreError
from mmerge.manifests.stores.base import DeferredCommit
from mmerge.manifests.stores.local import LocalStore
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.worker_pool import COMMITS_PER_WORKER, run_in_threads
from mmerge.workers.task import Task, TaskResult


class Shard:
    """Of a task, all that the pool looks at."""

    def __init__(self, name: str) -> None:
        self.shard, self.peak_bytes, self.num_bytes = name, 1, 1


class Disk:
    """A store whose disk is as slow as the test wants, and tasks that write one file each to it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.uri, self.ready, self.begun = str(folder), threading.Event(), threading.Semaphore(0)
        self.ran: list[str] = []
        open_store(self.uri, create=True)

        commit = LocalStore.commit

        def commit_later(store: LocalStore, deferred: Sequence[DeferredCommit]) -> None:
            assert self.ready.wait(60)
            commit(store, deferred)

        monkeypatch.setattr(LocalStore, "commit", commit_later)
        monkeypatch.setattr("mmerge.pipeline.execution.worker_pool.run_task", self.run_task)

    def run_task(self, task: Any, uri: str, *, commits: bool) -> TaskResult:
        assert not commits
        store = open_store(uri)
        with store.defer_commits() as deferred:
            store.put(task.shard, b"x")
        self.ran.append(task.shard)
        self.begun.release()
        return TaskResult(task.shard, 1, False, 0.0, deferred_commits=tuple(deferred))

    def names(self) -> list[str]:
        return sorted(open_store(self.uri).list())


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(tmp_path / "store", monkeypatch)


def make_shards(count: int) -> Any:
    return [Shard(f"s{number:02}") for number in range(count)]


def test_a_worker_goes_on_while_the_disk_is_waited_for_and_no_further_than_that(disk: Disk) -> None:
    ended: list[Task] = []
    found = run_in_threads(make_shards(20), disk.uri, num_threads=1, memory_bytes=None)
    pool = threading.Thread(target=lambda: ended.extend(task for task, _ in found))
    pool.start()
    bound = COMMITS_PER_WORKER + 1
    for _ in range(bound):
        assert disk.begun.acquire(timeout=60)
    assert not disk.begun.acquire(timeout=0.3), "a disk that does not follow holds the workers"
    assert len(disk.ran) == bound
    assert not ended, "nothing counts as done before it has its name"
    assert not disk.names()
    disk.ready.set()
    pool.join(60)
    assert (
        sorted(task.shard for task in ended)
        == disk.names()
        == [shard.shard for shard in make_shards(20)]
    )


def test_what_follows_begins_when_it_is_committed(disk: Disk) -> None:
    disk.ready.set()

    def follow(task: Task, result: TaskResult) -> list[Any]:
        assert not result.deferred_commits
        assert task.shard in disk.names()
        return [Shard(f"{task.shard}-then")] if len(task.shard) == 3 else []

    outcomes = list(
        run_in_threads(make_shards(2), disk.uri, num_threads=1, memory_bytes=None, follow=follow)
    )
    assert len(outcomes) == 4


def test_a_run_that_is_left_commits_what_ran(disk: Disk) -> None:
    disk.ready.set()
    found = run_in_threads(make_shards(50), disk.uri, num_threads=2, memory_bytes=None)
    next(found)
    found.close()
    assert 0 < len(disk.ran) < 50
    assert disk.names() == sorted(disk.ran)


def test_a_disk_that_fails_is_an_error_of_the_shard_and_the_others_are_kept(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all())))
    failed = threading.Event()

    commit = LocalStore.commit

    def fail_once(store: LocalStore, deferred: Sequence[DeferredCommit]) -> None:
        if (
            any(file.key.endswith(".json") for file in deferred)
            and len(list(store.list("objects"))) >= 6
            and not failed.is_set()
        ):
            failed.set()
            raise StoreError(f"{deferred[0].key}: Input/output error")
        commit(store, deferred)

    monkeypatch.setattr(LocalStore, "commit", fail_once)
    with pytest.raises(StoreError, match=r"objects/.*Input/output error"):
        run(plan, executor=SerialExecutor(num_threads=1))
    report = run(plan)
    assert report.num_computed["scan"] == 0
    assert report.num_reused["merge"] + report.num_reused["copy"] >= 3
    assert report.num_computed["merge"] + report.num_computed["copy"] >= 1
    verify(plan.recipe.output).check()
