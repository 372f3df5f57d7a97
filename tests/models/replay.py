"""Runs whose tasks are replayed: the driver and its protocol are real, the arithmetic is recorded.

A simulation makes a million store calls; merging the same tensors thousands of times would take all
of its time. The first execution of a task is recorded, later ones write the recorded bytes by the
calls that a worker makes.
"""

from __future__ import annotations

from dataclasses import replace

from models.clockwork import Clock, current_process
from models.simulated_store import World
from models.tiny_builds import InlineExecutor, TinyModels, tell

from mmerge.manifests.format.entry import object_key, read_entry, write_entry
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.build.run import RunReport, run
from mmerge.pipeline.monitoring.run_records import RunRecord, begin_run
from mmerge.pipeline.planning.plan import MergePlan, make_plan
from mmerge.pipeline.recipes.parsing import parse_recipe
from mmerge.workers.task import CopyTask, MergeTask, Task, TaskResult
from mmerge.workers.tasks.run import run_task


class ReplayingExecutor(InlineExecutor):
    """Runs each distinct task once, and then replays what it wrote."""

    def __init__(self) -> None:
        self._recorded: dict[str, tuple[dict[str, bytes], TaskResult]] = {}

    def run_one(self, task: Task, store_uri: str) -> TaskResult:
        contents, result = self._record(task)
        store = open_store(store_uri)
        if not isinstance(task, MergeTask | CopyTask):
            for key, data in contents.items():
                store.put(key, data)
            return result
        entry = None if task.fresh else read_entry(store, task.digest)
        if entry is not None:
            return replace(result, reused=True, entry=entry)
        key = object_key(task.digest)
        with store.open_writer(key) as out:
            out.write(contents[key])
        assert result.entry is not None
        write_entry(store, task.digest, result.entry)
        return result

    def _record(self, task: Task) -> tuple[dict[str, bytes], TaskResult]:
        name = f"{type(task).__name__} {getattr(task, 'digest', '') or getattr(task, 'key', '')}"
        if name not in self._recorded:
            world = World("recording", clock=Clock())
            process = current_process()
            assert process is not None
            process.bypasses.append(world)
            result = run_task(task, world.uri)
            process.bypasses.remove(world)
            contents = {key: stored.data for key, stored in world.objects.items()}
            self._recorded[name] = contents, result
        return self._recorded[name]


class ReplayedModels:
    """Plans of every recipe over one version of the inputs, and runs of them."""

    def __init__(self, models: TinyModels) -> None:
        self.models = models
        self.executor = ReplayingExecutor()
        self._plans: dict[float, MergePlan] = {}

    def run(
        self, world: World, *, name: str, weight: float, fresh: bool, exclusive: bool
    ) -> RunReport:
        """Run one recipe into a world, with a record of the run, as the command does."""
        plan = self._plan(world, weight)
        plan = replace(plan, recipe=replace(plan.recipe, name=name))
        store = open_store(world.uri)
        status = begin_run(store, name, exclusive=exclusive)
        with RunRecord(store, status) as record:
            return tell(run(plan, executor=self.executor, progress=record, fresh=fresh))

    def _plan(self, world: World, weight: float) -> MergePlan:
        if weight not in self._plans:
            raw = self.models.make_recipe(name="omni", weight=weight, output="model://world")
            self._plans[weight] = make_plan(parse_recipe(raw, folder=self.models.folder))
        plan = self._plans[weight]
        return replace(plan, recipe=replace(plan.recipe, output=world.uri))
