"""Conformance suite of executors: a test class for those of this package and of third parties.

    class TestMyExecutor(ExecutorConformance):
        def make_executor(self) -> Executor:
            return MyExecutor()

The tests run in pytest. They need a folder that all workers of the executor can read and write.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from mmerge.manifests.digest import digest_bytes
from mmerge.manifests.errors import MmergeError, StoreError
from mmerge.manifests.format.safetensors_header import make_header
from mmerge.manifests.stores.open import open_readable_store, open_store
from mmerge.pipeline.execution.executor import Executor
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.task import CopyTask, CopyTensor, ScannedRows, ScanTask, Task, TaskResult
from mmerge.workers.tasks.scan_cache import read_scan

NUM_TASKS = 6
PEAK_BYTES = 64 << 20


class ExecutorConformance(ABC):
    """What every executor must do; tests are the methods that begin with `test_`."""

    @abstractmethod
    def make_executor(self) -> Executor:
        """Return a new executor; it is used by all tests of the class, and closed after them."""

    @pytest.fixture(scope="class")
    def executor(self) -> Iterator[Executor]:
        """Yield the executor of the class: starting workers takes longer than the tests."""
        executor = self.make_executor()
        try:
            yield executor
        finally:
            executor.close()

    @pytest.fixture
    def tasks(self, tmp_path: Path) -> list[ScanTask]:
        """Return scans of the tensors of a small checkpoint."""
        return make_scan_tasks(tmp_path / "checkpoint", num_tasks=NUM_TASKS)

    def test_every_task_is_yielded_once_with_its_result(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """All tasks end with a result, and what they wrote is in the store."""
        store = open_store(str(tmp_path / "store"), create=True)
        outcomes = list(executor.run(tasks, store.uri))
        assert sorted(task.shard for task, _ in outcomes) == [task.shard for task in tasks]
        for task, outcome in outcomes:
            assert isinstance(outcome, TaskResult), outcome
            assert isinstance(task, ScanTask)
            assert outcome.num_bytes == task.num_bytes
            assert not outcome.deferred_commits, "files are committed before the task is yielded"
            assert read_scan(store, task.key) is not None

    def test_finished_tasks_are_reused(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """An executor can run again, and tasks find what they wrote before."""
        store = open_store(str(tmp_path / "store"), create=True)
        list(executor.run(tasks, store.uri))
        outcomes = [outcome for _, outcome in executor.run(tasks, store.uri)]
        assert len(outcomes) == len(tasks)
        assert all(isinstance(outcome, TaskResult) and outcome.reused for outcome in outcomes)

    def test_a_failure_is_yielded_and_the_other_tasks_are_finished(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """A task's own error is an outcome: it ends neither the run nor other tasks."""
        store = open_store(str(tmp_path / "store"), create=True)
        (tmp_path / "checkpoint" / "model-2.safetensors").unlink()
        outcomes = {task.shard: outcome for task, outcome in executor.run(tasks, store.uri)}
        failed = outcomes.pop("shard2")
        assert isinstance(failed, MmergeError)
        assert len(outcomes) == len(tasks) - 1
        assert all(isinstance(outcome, TaskResult) for outcome in outcomes.values())

    def test_followers_run_and_are_followed_in_turn(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """`follow` is called once per result, before it is yielded, and its tasks are run."""
        store = open_store(str(tmp_path / "store"), create=True)
        followed: list[str] = []

        def follow(task: Task, result: TaskResult) -> Sequence[Task]:
            followed.append(task.shard)
            following = int(task.shard.removeprefix("shard")) + 2
            return [tasks[following]] if following < len(tasks) else []

        yielded = []
        for task, _ in executor.run(tasks[:2], store.uri, follow):
            assert task.shard in followed
            yielded.append(task.shard)
        assert sorted(yielded) == sorted(followed) == [task.shard for task in tasks]

    def test_nothing_follows_from_a_failure(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """`follow` is not called with a task that failed."""
        store = open_store(str(tmp_path / "store"), create=True)
        (tmp_path / "checkpoint" / "model-0.safetensors").unlink()
        followed: list[str] = []

        def follow(task: Task, result: TaskResult) -> Sequence[Task]:
            followed.append(task.shard)
            return ()

        list(executor.run(tasks, store.uri, follow))
        assert sorted(followed) == [task.shard for task in tasks[1:]]

    def test_results_carry_the_entry_of_an_object(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """A task that writes an object returns its entry."""
        store = open_store(str(tmp_path / "store"), create=True)
        copy = make_copy_task(tasks[0])
        ((_, outcome),) = executor.run([copy], store.uri)
        assert isinstance(outcome, TaskResult), outcome
        assert store.exists(outcome.entry.object.key)

    def test_a_run_that_is_closed_early_leaves_complete_results_alone(
        self, executor: Executor, tasks: list[ScanTask], tmp_path: Path
    ) -> None:
        """What is in the store after an early end is complete, and the next run continues."""
        store = open_store(str(tmp_path / "store"), create=True)
        with closing(executor.run(tasks, store.uri)) as outcomes:
            first, _ = next(outcomes)
        assert isinstance(first, ScanTask)
        assert read_scan(store, first.key) is not None
        assert len(list(executor.run(tasks, store.uri))) == len(tasks)

    def test_no_tasks_are_no_outcomes(self, executor: Executor, tmp_path: Path) -> None:
        """A run of nothing ends at once."""
        store = open_store(str(tmp_path / "store"), create=True)
        assert list(executor.run([], store.uri)) == []


class SeparateProcessConformance(ExecutorConformance):
    """What executors must do whose tasks run in other processes."""

    def test_a_store_in_memory_is_refused(self, executor: Executor, tasks: list[ScanTask]) -> None:
        """Other processes cannot see a store in this process's memory."""
        with pytest.raises(StoreError, match="other processes cannot see it"):
            list(executor.run(tasks, "memory://conformance"))


def make_scan_tasks(folder: Path, *, num_tasks: int) -> list[ScanTask]:
    """Write a checkpoint of one tensor per file into `folder`; return a scan task of each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    names = [f"tensor{index}" for index in range(num_tasks)]
    files = [f"model-{index}.safetensors" for index in range(num_tasks)]
    for index, name in enumerate(names):
        header, _ = make_header([(name, "F32", (8, 16))], metadata={})
        (folder / files[index]).write_bytes(header + _tensor_bytes(index))
    index_text = json.dumps({"weight_map": dict(zip(names, files, strict=True))})
    (folder / "model.safetensors.index.json").write_text(index_text)
    store = open_readable_store(str(folder))
    tensors = Checkpoint(str(folder), owner="base").tensors
    return [
        ScanTask(
            key=f"{index:064x}",
            shard=f"shard{index}",
            expert_names=(),
            tensors=(),
            copies=(CopyTensor(name, "base", 0, 8, tensors[name]),),
            copies_owner="base",
            identities=((str(folder), file, store.identity(file)),),
            magnitudes=False,
            non_finite="keep",
            block_entries=1 << 16,
            num_bytes=tensors[name].spec.num_bytes,
            peak_bytes=PEAK_BYTES,
        )
        for index, (name, file) in enumerate(zip(names, files, strict=True))
    ]


def _tensor_bytes(index: int) -> bytes:
    return bytes([index]) * (8 * 16 * 4)


def make_copy_task(scan: ScanTask) -> CopyTask:
    """Return the task that copies the tensors of a scan of `make_scan_tasks` into an object."""
    index = int(scan.key, 16)
    return CopyTask(
        digest="c" * 64,
        shard=scan.shard,
        role="base",
        expert="",
        tensors=scan.copies,
        scanned=((ScannedRows(0, 8, digest_bytes(_tensor_bytes(index))),),),
        block_entries=scan.block_entries,
        num_bytes=scan.num_bytes,
        peak_bytes=PEAK_BYTES,
    )
