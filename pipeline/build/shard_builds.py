"""Drives the builds of all shards: resumes each one when what it waits for is done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from mmerge.manifests.format.entry import ShardEntry, object_key
from mmerge.pipeline.build.changed_inputs import ScanOutdated
from mmerge.workers.checkpoints.input_digests import ChangedInput
from mmerge.workers.task import (
    CopyTask,
    MeasureTask,
    MergeTask,
    OnePassTask,
    RefineTask,
    ScanTask,
)
from mmerge.workers.tasks.scan_cache import ScanResult

BuildTask = ScanTask | RefineTask | MeasureTask | OnePassTask | MergeTask | CopyTask
"""The tasks of a build."""
FinalTask = MergeTask | CopyTask
"""A task that writes an object: the last one of each shard."""


@dataclass(frozen=True)
class OnePassResult:
    """What a OnePassTask left: the scan of a shard, and the object that was merged on the way."""

    scan: ScanResult
    entry: ShardEntry


@dataclass(frozen=True, eq=False)
class Barrier:
    """A result that several shards compute together, from a contribution of each.

    Order of calls:

    1. every member shard adds its contribution to the object that owns the barrier;
    2. it yields the barrier, and is suspended;
    3. after the last member has done so, `ShardBuilds` calls `finish`, once;
    4. all members are resumed, in the order in which they arrived.
    """

    num_members: int
    finish: Callable[[], None]


ShardBuild = Generator[BuildTask | Barrier, Any, ShardEntry]
"""The build of one shard.

It yields a task and is sent the result that the task left in the store (a `ScanResult`, for the
last task a `ShardEntry`), or a `ChangedInput` where it left none; or it yields a barrier. It
returns the entry of its object, or raises `ScanOutdated`. Of a `OnePassResult` it is sent the scan.
"""
FindResult = Callable[[BuildTask], Any]
"""Returns what an earlier run left of a task, None where there is nothing."""


def task_id(task: BuildTask) -> str:
    """Return the digest that names what a task writes: equal tasks need to run only once."""
    return task.digest if isinstance(task, FinalTask) else task.key


class ShardBuilds:
    """The builds of all shards of a plan, each of them finished, at a task or at a barrier.

    Shards that yield the same task (experts that share an encoder) wait for one run of it.

    Order of calls:

    1. `start` runs every build as far as the store has results, and returns the tasks to run;
    2. `follow` takes the result of one of them, and returns the tasks that follow from it.
    """

    def __init__(self, builds: Mapping[str, ShardBuild]) -> None:
        """Take the builds by shard name; none of them has been started."""
        self._builds = dict(builds)
        self._waiting: dict[str, list[str]] = {}
        self._at_barriers: dict[Barrier, list[str]] = {}
        self.requests: dict[str, BuildTask | Barrier] = {}
        """What each shard that is not finished waits for."""
        self.final_tasks: dict[str, FinalTask] = {}
        """The merge or copy task of each shard that has reached it."""
        self.entries: dict[str, ShardEntry] = {}
        """The entry of each finished shard."""
        self.finished: list[str] = []
        """The finished shards in their order."""
        self.outdated_scans: dict[str, tuple[ScanTask, ...]] = {}
        """By shard that cannot be finished because its inputs changed: the scans to delete."""
        self._entries_by_key: dict[str, ShardEntry] = {}
        """By key of the object: what tasks of this pass have made."""

    @property
    def num_shards(self) -> int:
        """All shards of the plan, finished or not."""
        return len(self._builds)

    @property
    def is_finished(self) -> bool:
        """Whether every shard has its object."""
        return len(self.finished) == len(self._builds)

    def start(self, find: FindResult) -> list[BuildTask]:
        """Return the first task of each shard that `find` has no result of."""
        return self._advance([(name, None) for name in self._builds], find)

    def follow(
        self, task: BuildTask, result: Any, find: FindResult = lambda _: None
    ) -> list[BuildTask]:
        """Return the tasks to run now that this one has ended with `result`."""
        if isinstance(result, OnePassResult):
            # Its shard comes to the merge task of this object next, and finds it.
            self._entries_by_key[result.entry.object.key] = result.entry
            result = result.scan
        elif isinstance(task, FinalTask) and not isinstance(result, ChangedInput):
            self._entries_by_key[object_key(task.digest)] = result
        names = self._waiting.pop(task_id(task))
        return self._advance([(name, result) for name in names], find)

    def _advance(self, ready: list[tuple[str, Any]], find: FindResult) -> list[BuildTask]:
        """Resume shards with the result that each is sent, until all wait for tasks or barriers."""
        queue = deque(ready)
        tasks: list[BuildTask] = []
        while queue:
            name, result = queue.popleft()
            request = self._resume(name, result)
            del result  # a scan result may be large
            if request is None:
                continue
            if isinstance(request, Barrier):
                queue.extend((member, None) for member in self._arrive(name, request))
                continue
            if task_id(request) in self._waiting:
                self._waiting[task_id(request)].append(name)
                continue
            known_result = self._entries_by_key.get(object_key(task_id(request))) or find(request)
            if known_result is None:
                self._waiting[task_id(request)] = [name]
                tasks.append(request)
            else:
                queue.appendleft((name, known_result))
            del known_result
        return tasks

    def _resume(self, name: str, result: Any) -> BuildTask | Barrier | None:
        """Return what a shard waits for next, None when it is finished."""
        try:
            request = self._builds[name].send(result)
        except StopIteration as end:
            self.entries[name] = end.value
            self.finished.append(name)
            self.requests.pop(name, None)
            return None
        except ScanOutdated as outdated:
            self.outdated_scans[name] = outdated.scans
            self.requests.pop(name, None)
            return None
        self.requests[name] = request
        if isinstance(request, FinalTask):
            self.final_tasks[name] = request
        return request

    def _arrive(self, name: str, barrier: Barrier) -> list[str]:
        """Return the members to resume: all of them after the last one has arrived."""
        members = self._at_barriers.setdefault(barrier, [])
        members.append(name)
        if len(members) < barrier.num_members:
            return []
        del self._at_barriers[barrier]
        barrier.finish()
        return members
