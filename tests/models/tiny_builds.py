"""Tiny checkpoints, recipes over them, and the true bytes of everything that they build.

A run takes milliseconds: plan, driver, tasks and commit are the product's, the executor runs each
task in the driver's thread.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from blake3 import blake3
from conftest import Lab
from models.clockwork import current_process
from models.simulated_bucket import simulated_buckets
from models.simulated_modules import simulated_modules
from models.simulated_store import World

import mmerge.manifests.stores.open as open_module
import mmerge.pipeline.build.commit as commit_module
from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.build.run import RunReport, run
from mmerge.pipeline.execution.executor import Executor
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.monitoring.progress import Progress
from mmerge.pipeline.monitoring.run_records import RunRecord, begin_run
from mmerge.pipeline.planning.plan import make_plan
from mmerge.pipeline.recipes.parsing import parse_recipe
from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.run import run_task

WEIGHTS = (1.0, 0.5)
"""Recipes differ in the weight of task arithmetic."""
VERSIONS = (0, 1)
"""Versions of one expert's file."""
CHANGING = "image"


class InlineExecutor(Executor):
    """Runs tasks in the driver's thread, one after the other."""

    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        waiting = deque(tasks)
        while waiting:
            task = waiting.popleft()
            try:
                outcome: TaskResult | Exception = self.run_one(task, store_uri)
            except MmergeError as error:
                outcome = error
            if isinstance(outcome, TaskResult):
                waiting.extendleft(reversed(follow(task, outcome)))
            yield task, outcome

    def run_one(self, task: Task, store_uri: str) -> TaskResult:
        return run_task(task, store_uri)

    def close(self) -> None:
        return None


class SilentProgress(Progress):
    """Shows nothing."""

    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        pass

    def advance(self, phase: str, result: TaskResult) -> None:
        pass

    def fail(self, phase: str, shard: str, error: Exception) -> None:
        pass


def tell(report: RunReport) -> RunReport:
    """Let the model check a report at the moment of its lease's end; return the report.

    Later, a collection may delete the build if another one has its name.
    """
    process = current_process()
    if process is not None and "on_report" in process.settings:
        process.settings["on_report"](process, report)
    return report


@dataclass
class Truth:
    """What clean builds of all recipes and input versions store."""

    objects: dict[str, bytes] = field(default_factory=dict)
    """By key, of `objects/…safetensors`."""
    builds: dict[tuple[float, int], str] = field(default_factory=dict)
    """By recipe and version of the input, the build."""


class TinyModels:
    """A base and two experts in a folder, one of which has two versions of its file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lab = Lab(folder)
        lab.config |= {
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": 8,
        }
        self.recipe = lab.make_all(2) | {"method": "task_arithmetic"}
        self.spare = folder / "spare"
        self.spare.mkdir()
        for number in VERSIONS:
            lab.make_expert(CHANGING, 10 + number)
            shutil.copy(self.path, self.spare / str(number))
        self.version = -1
        self.set_version(0)
        self.truth = Truth()

    @property
    def path(self) -> Path:
        return self.folder / CHANGING / "model.safetensors"

    def set_version(self, number: int) -> None:
        """Replace the file of the changing expert by one of its versions."""
        if number == self.version:
            return
        copy = self.path.with_suffix(".new")
        shutil.copy(self.spare / str(number), copy)
        # Each version has a time of its own, so that a file is identified by its content.
        os.utime(copy, ns=(10**18 + number * 10**12,) * 2)
        copy.replace(self.path)
        self.version = number

    def make_recipe(self, *, name: str, weight: float, output: str) -> dict[str, Any]:
        """Return a recipe of task arithmetic with one weight for all experts."""
        experts = {
            expert: {**options, "weight": weight}
            for expert, options in self.recipe["experts"].items()
        }
        return self.recipe | {"name": name, "output": output, "experts": experts}

    def run(
        self,
        world: World,
        *,
        name: str = "omni",
        weight: float = 1.0,
        fresh: bool = False,
        records: bool = False,
        exclusive: bool = False,
    ) -> RunReport:
        """Plan and run one recipe into a world, as the command does."""
        raw = self.make_recipe(name=name, weight=weight, output=world.uri)
        plan = make_plan(parse_recipe(raw, folder=self.folder))
        if not records:
            return tell(
                run(plan, executor=InlineExecutor(), progress=SilentProgress(), fresh=fresh)
            )
        status = begin_run(open_module.open_store(world.uri), name, exclusive=exclusive)
        with RunRecord(open_module.open_store(world.uri), status) as record:
            return tell(run(plan, executor=InlineExecutor(), progress=record, fresh=fresh))

    def learn_truth(self) -> None:
        """Build every recipe from every version of the inputs, into a world of its own each."""
        for number in VERSIONS:
            self.set_version(number)
            for weight in WEIGHTS:
                world = World(f"truth-{number}-{weight}")
                report = world.start("truth", lambda: self.run(world, weight=weight))  # noqa: B023
                report.run_to_end()
                if report.error is not None:
                    raise report.error
                self.truth.builds[weight, number] = report.result.build
                self.truth.objects |= {
                    key: stored.data
                    for key, stored in world.objects.items()
                    if key.endswith(".safetensors") and key.startswith("objects/")
                }
        self.set_version(0)


def _make_table(entries: Any) -> bytes:
    """Write the table as the process's version of pyarrow does: another one has other bytes."""
    process = current_process()
    codec = process.settings.get("table", "zstd") if process else "zstd"
    if codec == "zstd":
        return _real_make_table(entries)
    import pyarrow.parquet

    real_write = pyarrow.parquet.write_table

    def write(table: Any, where: Any, **options: Any) -> None:
        real_write(table, where, **options | {"compression": codec})

    with mock.patch.object(pyarrow.parquet, "write_table", write):
        return _real_make_table(entries)


_real_make_table = commit_module.make_table


@contextmanager
def simulated_world() -> Iterator[None]:
    """Let product code run in simulated processes, over `model://` stores."""
    scheme = {"model": "models.simulated_store:SimulatedStore"}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(open_module.BUILT_IN_STORES, scheme))
        stack.enter_context(simulated_modules())
        stack.enter_context(simulated_buckets())
        # The versions of packages take longer to find than all store calls of a run.
        stack.enter_context(mock.patch.object(commit_module, "version", cache(version)))
        stack.enter_context(mock.patch.object(commit_module, "make_table", _make_table))
        yield


def needed_keys(manifest: bytes) -> set[str]:
    """Return every key of a build, by reading its manifest without the project's code."""
    raw = json.loads(manifest)
    keys = {f"builds/{raw['build']}/manifest.json", raw["table"]["key"]}
    for record in (raw["base"], *raw["experts"]):
        keys |= {f"files/{file['digest']}" for file in record["files"]}
    for entry in raw["entries"]:
        keys |= {entry["key"], entry["key"].removesuffix(".safetensors") + ".json"}
    return keys


def digest(data: bytes) -> str:
    return str(blake3(data).hexdigest())
