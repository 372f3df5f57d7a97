"""A shard takes its own steps, and waits for others only where its result depends on them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from mmerge.manifests.errors import MmergeError, NonFiniteError, RecipeError, TaskErrors
from mmerge.manifests.stores.base import ReadableStore
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.build.context import BuildContext, group_by_tensor
from mmerge.pipeline.build.forecast import make_forecast
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.workers.checkpoints import weight_files
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.task import Task, TaskResult
from mmerge.workers.tasks.run import run_task


class FollowersLast(SerialExecutor):
    """Runs one task at a time; what follows from a task waits for all tasks before it."""

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        queue = deque(tasks)
        while queue:
            task = queue.popleft()
            result = run_task(task, store_uri)
            queue.extend(follow(task, result))
            yield task, result


class NothingFollows(SerialExecutor):
    """Breaks the contract of executors."""

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        yield from super().run(tasks, store_uri)


class Recorder(Progress):
    """The phases and shards of a run, in order."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, str]] = []
        self.begun: dict[str, int] = {}

    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        self.begun[phase] = self.begun.get(phase, 0) + num_tasks

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        self.ended.append((phase, result.shard))

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        self.ended.append((phase, f"{shard} failed"))

    def place(self, phase: str, which: int) -> int:
        return [index for index, (name, _) in enumerate(self.ended) if name == phase][which]

    def shards(self, phase: str) -> list[str]:
        return [shard for name, shard in self.ended if name == phase]


def build(
    lab: Any, changes: dict[str, Any], executor: SerialExecutor
) -> tuple[dict[str, bytes], Recorder]:
    raw = lab.make_all()
    del raw["method"]
    recorder = Recorder()
    plan = make_plan(read_recipe(lab.write_recipe(raw | changes)))
    run(plan, executor=executor, progress=recorder)
    folder: Path = lab.folder / changes["output"]
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("objects", "files", "builds")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }
    return files, recorder


@pytest.fixture(name="in_step")
def let_workers_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes then come in the order in which the tasks ran."""
    monkeypatch.setattr("mmerge.pipeline.execution.worker_pool.COMMITS_PER_WORKER", 0)


CASES: list[tuple[dict[str, Any], torch.dtype, str]] = [
    ({"method": "ties", "density": 0.2, "scope": "tensor"}, torch.bfloat16, "merge"),
    ({"method": "ties", "density": 0.2, "scope": "tensor"}, torch.float32, "merge"),
    ({"method": "linear"}, torch.bfloat16, "merge"),
    ({"method": "emr"}, torch.bfloat16, "merge"),
    ({"method": "mmer", "scope": "tensor"}, torch.float32, "merge"),
    ({"method": "mmer", "scope": "model"}, torch.bfloat16, "copy"),
    ({"method": "ties", "density": 0.2, "scope": "model"}, torch.float32, "nothing"),
]


@pytest.mark.parametrize(("changes", "dtype", "first"), CASES)
def test_a_shard_goes_on_before_the_last_scan_and_order_does_not_change_the_bytes(
    lab: Any, changes: dict[str, Any], dtype: torch.dtype, first: str
) -> None:
    lab.dtype = dtype
    late, late_recorder = build(lab, changes | {"output": "late"}, FollowersLast())
    early, recorder = build(lab, changes | {"output": "early"}, SerialExecutor(num_threads=1))
    assert early == late
    assert len(late) > 10
    last_scan = recorder.place("scan", -1)
    assert late_recorder.place("scan", -1) < late_recorder.place("merge", 0)
    assert (recorder.place("merge", 0) < last_scan) == (first == "merge")
    if "mmer" in changes["method"]:
        assert recorder.place("copy", 0) < last_scan
    assert sorted(recorder.ended) == sorted(late_recorder.ended), "every shard once in every phase"
    assert recorder.begun == late_recorder.begun


@pytest.mark.usefixtures("in_step")
def test_a_merge_follows_its_own_scan_at_once(lab: Any) -> None:
    changes = {"method": "linear", "output": "store"}
    _, recorder = build(lab, changes, SerialExecutor(num_threads=1))
    merged = recorder.shards("merge")
    assert merged == [name for name in recorder.shards("scan") if name in merged]
    for name in merged:
        distance = recorder.ended.index(("merge", name)) - recorder.ended.index(("scan", name))
        assert distance <= 3, "a scan that had begun, and a copy, may come in between"


@pytest.mark.usefixtures("in_step")
def test_nothing_follows_a_failure_and_finished_merges_are_kept(lab: Any) -> None:
    raw = lab.make_all()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        tensors["language_model.model.norm.weight"][5] = float("nan")

    lab.make_expert("audio", 1, change=spoil)
    plan = make_plan(read_recipe(lab.write_recipe(raw | {"method": "linear"})))
    recorder = Recorder()
    both = r"up_proj.weight: NaN at \[3, 4\](.|\n)*norm.weight: NaN at \[5\]"
    with pytest.raises(TaskErrors, match=both):
        run(plan, executor=SerialExecutor(num_threads=1), progress=recorder)
    assert recorder.shards("merge") == ["layers.0"], "scanned before the first failure"
    folder = lab.folder / "store"
    assert not (folder / "builds").exists()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "objects").iterdir()}
    norm = "language_model.model.norm.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors[norm].fill_(1.0))
    report = run(plan, executor=SerialExecutor(num_threads=1), progress=Recorder())
    assert report.is_new
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def split_into_small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmerge.pipeline.planning.plan.MAX_SHARD_BYTES", 512)
    monkeypatch.setattr("mmerge.pipeline.planning.shards.MAX_PIECE_BYTES", 512)


@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize("method", [{"method": "ties", "density": 0.2}, {"method": "emr"}])
def test_shards_that_hold_one_tensor_wait_for_each_other_alone(
    lab: Any, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    split_into_small_shards(monkeypatch)
    changes = method | ({"scope": "tensor"} if "density" in method else {})
    late, _ = build(lab, changes | {"output": "late"}, FollowersLast())
    early, recorder = build(lab, changes | {"output": "early"}, SerialExecutor(num_threads=1))
    assert early == late
    split = [name for name in recorder.shards("merge") if name.startswith("embed")]
    assert len(split) > 1
    first_merge = recorder.ended.index(("merge", split[0]))
    last_scan = max(recorder.ended.index(("scan", name)) for name in split)
    assert last_scan < first_merge < recorder.place("scan", -1)


def test_shards_are_grouped_by_the_tensors_that_they_share(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into_small_shards(monkeypatch)
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all())))
    groups = group_by_tensor(plan.merge_shards)
    names = [{tensor.name for shard in group for tensor in shard.tensors} for group in groups]
    assert sum(len(group) for group in groups) == len(plan.merge_shards)
    assert any(len(group) > 1 for group in groups)
    assert sum(map(len, names)) == len(set().union(*names)), "no tensor lies in two groups"


def test_the_log_names_each_phase_once(lab: Any, caplog: pytest.LogCaptureFixture) -> None:
    lab.dtype = torch.float32
    raw = lab.make_all() | {"method": "ties", "density": 0.2, "scope": "tensor"}
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    with caplog.at_level(logging.INFO, logger="mmerge.run"):
        run(plan, executor=SerialExecutor(num_threads=1), progress=LogProgress())
    lines = [record.message for record in caplog.records if " shards, " in record.message]
    assert [line.split(":")[0] for line in lines] == ["scan", "thresholds", "merge", "copy"]


def test_one_failure_is_raised_as_it_is(lab: Any) -> None:
    raw = lab.make_all()
    norm = "language_model.model.norm.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors[norm].fill_(float("inf")))
    plan = make_plan(read_recipe(lab.write_recipe(raw | {"method": "linear"})))
    with pytest.raises(NonFiniteError, match="Inf at"):
        run(plan, executor=SerialExecutor(num_threads=1))


def test_an_executor_that_ignores_followers_is_an_error(lab: Any) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all())))
    with pytest.raises(MmergeError, match="must run the tasks that 'follow' returns"):
        run(plan, executor=NothingFollows(num_threads=1))


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_no_histogram_outlives_the_thresholds(
    lab: Any, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    contexts: list[BuildContext] = []

    class Kept(BuildContext):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            contexts.append(self)

    monkeypatch.setattr("mmerge.pipeline.build.run.BuildContext", Kept)
    changes = {"method": "mmer", "scope": scope, "output": "store"}
    build(lab, changes, SerialExecutor(num_threads=1))
    (context,) = contexts
    assert len(context.digests.merged) == len(lab.base)
    searches = set(context.searches.values())
    assert len(searches) == (1 if scope == "model" else 5)
    assert not any(search.num_histograms for search in searches)


def test_histograms_of_the_whole_model_are_summed_as_they_arrive(lab: Any) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"scope": "model"})))
    context = BuildContext(plan, fresh=True)
    (search,) = set(context.searches.values())
    counts = (torch.tensor([2]).numpy(), torch.tensor([1]).numpy())
    for shard in plan.merge_shards:
        names = [f"{tensor.name}:{tensor.row_start}" for tensor in shard.tensors]
        search.add(shard, {f"{name}:{index}": counts for name in names for index in range(3)})
        assert search.num_histograms == 3, "one sum per expert"


def test_a_density_that_differs_between_tensors_is_refused_before_anything_is_read(
    lab: Any,
) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"scope": "model"})))
    name = plan.merge_shards[0].tensors[0].name
    numbers = plan.method_parameters[name]
    changed = replace(numbers, parameters=numbers.parameters | {"density": 0.5})
    with pytest.raises(RecipeError, match="Add 'scope: tensor'"):
        run(replace(plan, method_parameters=plan.method_parameters | {name: changed}))
    assert not list((lab.folder / "store").glob("surveys/*"))


def test_every_checkpoint_is_opened_once_for_plan_forecast_and_run(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    headers: list[str] = []
    open_checkpoint, read_header = Checkpoint.__init__, weight_files.read_specs

    def open_and_note(self: Checkpoint, uri: str, *, owner: str) -> None:
        opened.append(uri)
        open_checkpoint(self, uri, owner=owner)

    def read_and_note(store: ReadableStore, file: str, *, where: str) -> Any:
        headers.append(where)
        return read_header(store, file, where=where)

    monkeypatch.setattr(Checkpoint, "__init__", open_and_note)
    monkeypatch.setattr(weight_files, "read_specs", read_and_note)
    recipe = read_recipe(lab.write_recipe(lab.make_all()))
    plan = make_plan(recipe)
    make_forecast(plan)
    run(plan, executor=SerialExecutor(num_threads=1))
    assert len(opened) == 1 + len(recipe.experts)
    assert len(opened) == len(set(opened))
    assert len(headers) == len(set(headers)) == len(opened)


def test_a_plan_that_is_run_again_notices_a_replaced_expert(lab: Any) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"method": "linear"})))
    first = run(plan, executor=SerialExecutor(num_threads=1))
    norm = "language_model.model.norm.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors[norm].fill_(1.0))
    second = run(plan, executor=SerialExecutor(num_threads=1))
    assert second.is_new
    assert second.build != first.build
    assert second.num_computed["merge"] == 1


@pytest.mark.parametrize(
    "changes", [{"scope": "tensor"}, {"scope": "model"}, {"method": "emr"}], ids=str
)
def test_a_forecast_judges_every_shard_as_the_run_then_does(
    lab: Any, changes: dict[str, Any]
) -> None:
    raw = lab.make_all() | changes
    run(make_plan(read_recipe(lab.write_recipe(raw))), executor=SerialExecutor(num_threads=1))
    norm = "language_model.model.norm.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors[norm].fill_(1.0))
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    unread = make_forecast(plan)
    assert 0 < unread.count("unknown") < len(unread.shards)
    forecast = make_forecast(plan, scan=True)
    assert forecast.count("unknown") == 0
    recorder = Recorder()
    report = run(plan, executor=SerialExecutor(num_threads=1), progress=recorder)
    assert report.num_computed["scan"] == 0, "the forecast left its scans in the store"
    computed = [shard.shard for shard in forecast.shards if shard.state == "compute"]
    assert sorted(computed) == sorted(recorder.shards("merge") + recorder.shards("copy"))
