"""A shard is merged as soon as its own survey is done, unless it depends on others; the result is
the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

from mmerge.manifests.errors import NonFiniteError, TaskErrors
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.build.shard import Flow
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.pipeline.monitoring.progress import LogProgress, Progress
from mmerge.workers.task import Task, TaskResult


class InPhases(SerialExecutor):
    """Lets nothing follow: every phase waits for the end of the one before."""

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        yield from super().run(tasks, store_uri)


class Told(Progress):
    """What a run says of its phases, in order."""

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
        return [index for index, (found, _) in enumerate(self.ended) if found == phase][which]


def build(
    lab: Any, changes: dict[str, Any], executor: SerialExecutor
) -> tuple[dict[str, bytes], Told]:
    raw = lab.make_all()
    del raw["method"]
    told = Told()
    run(make_plan(read_recipe(lab.write_recipe(raw | changes))), executor=executor, progress=told)
    folder: Path = lab.folder / changes["output"]
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for part in ("objects", "files", "builds")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }
    return found, told


@pytest.fixture(name="in_step")
def let_workers_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends is then told in the order in which it ran."""
    monkeypatch.setattr("mmerge.pipeline.execution.worker_pool.SETTLING_AT_ONCE", 0)


CASES: list[tuple[dict[str, Any], torch.dtype, str]] = [
    ({"method": "ties", "density": 0.2, "scope": "tensor"}, torch.bfloat16, "merge"),
    ({"method": "ties", "density": 0.2, "scope": "tensor"}, torch.float32, "merge"),
    ({"method": "linear"}, torch.bfloat16, "merge"),
    ({"method": "mmer", "scope": "tensor"}, torch.float32, "merge"),
    ({"method": "mmer", "scope": "model"}, torch.bfloat16, "carry"),
    ({"method": "ties", "density": 0.2, "scope": "model"}, torch.float32, "nothing"),
]


@pytest.mark.parametrize(("changes", "dtype", "first"), CASES)
def test_what_depends_on_one_survey_begins_before_the_last_one_and_the_bytes_are_the_same(
    lab: Any, changes: dict[str, Any], dtype: torch.dtype, first: str
) -> None:
    lab.dtype = dtype
    waited, told_in_phases = build(lab, changes | {"output": "waited"}, InPhases(num_threads=1))
    flowed, told = build(lab, changes | {"output": "flowed"}, SerialExecutor(num_threads=1))
    assert flowed == waited
    assert len(waited) > 10
    last = told.place("survey", -1)
    assert told_in_phases.place("survey", -1) < told_in_phases.place("merge", 0)
    assert (told.place("merge", 0) < last) == (first == "merge")
    if "mmer" in changes["method"]:
        assert told.place("carry", 0) < last
    assert sorted(told.ended) == sorted(told_in_phases.ended), "every shard once in every phase"
    assert told.begun == told_in_phases.begun


@pytest.mark.usefixtures("in_step")
def test_a_merge_follows_its_own_survey_at_once(lab: Any) -> None:
    _, told = build(lab, {"method": "linear", "output": "store"}, SerialExecutor(num_threads=1))
    ended = [name for phase, name in told.ended if phase == "merge"]
    surveys = [name for phase, name in told.ended if phase == "survey" and name in ended]
    assert ended == surveys, "in the order of the surveys"
    for name in ended:
        assert told.ended.index(("merge", name)) - told.ended.index(("survey", name)) <= 3, (
            "a survey that began meanwhile, and a copy"
        )


@pytest.mark.usefixtures("in_step")
def test_nothing_follows_a_failure_and_what_was_merged_is_kept(lab: Any) -> None:
    raw = lab.make_all()

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
        tensors["language_model.model.norm.weight"][5] = float("nan")

    lab.make_expert("audio", 1, change=spoil)
    plan = make_plan(read_recipe(lab.write_recipe(raw | {"method": "linear"})))
    told = Told()
    with pytest.raises(
        TaskErrors, match=r"up_proj.weight: NaN at \[3, 4\](.|\n)*norm.weight: NaN at \[5\]"
    ):
        run(plan, executor=SerialExecutor(num_threads=1), progress=told)
    merged = [name for phase, name in told.ended if phase == "merge"]
    assert merged == ["layers.0"], "the one whose survey was done before the first failure"
    folder = lab.folder / "store"
    assert not (folder / "builds").exists()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "objects").iterdir()}
    lab.make_expert(
        "audio", 1, change=lambda tensors: tensors["language_model.model.norm.weight"].fill_(1.0)
    )
    report = run(plan, executor=SerialExecutor(num_threads=1), progress=Told())
    assert report.is_new
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_shard_whose_tensor_lies_in_two_shards_waits(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmerge.pipeline.planning.plan.MAX_SHARD_BYTES", 512)
    monkeypatch.setattr("mmerge.pipeline.planning.plan.MAX_PIECE_BYTES", 512)
    changes = {"method": "ties", "density": 0.2, "scope": "tensor"}
    waited, _ = build(lab, changes | {"output": "waited"}, InPhases(num_threads=1))
    flowed, told = build(lab, changes | {"output": "flowed"}, SerialExecutor(num_threads=1))
    assert flowed == waited
    merged = [name for phase, name in told.ended[: told.place("survey", -1)] if phase == "merge"]
    split = [name for phase, name in told.ended if phase == "merge" and name.startswith("embed")]
    assert len(split) > 1
    assert merged
    assert not set(merged) & set(split)


def test_the_log_names_each_phase_once(lab: Any, caplog: pytest.LogCaptureFixture) -> None:
    lab.dtype = torch.float32
    raw = lab.make_all() | {"method": "ties", "density": 0.2, "scope": "tensor"}
    with caplog.at_level(logging.INFO, logger="mmerge.run"):
        run(
            make_plan(read_recipe(lab.write_recipe(raw))),
            executor=SerialExecutor(num_threads=1),
            progress=LogProgress(),
        )
    lines = [record.message for record in caplog.records if " shards, " in record.message]
    assert [line.split(":")[0] for line in lines] == ["survey", "thresholds", "merge", "carry"]


def test_an_expert_with_nan_alone_is_one_error(lab: Any) -> None:
    raw = lab.make_all()
    lab.make_expert(
        "audio",
        1,
        change=lambda tensors: tensors["language_model.model.norm.weight"].fill_(float("inf")),
    )
    with pytest.raises(NonFiniteError, match="Inf at"):
        run(
            make_plan(read_recipe(lab.write_recipe(raw | {"method": "linear"}))),
            executor=SerialExecutor(num_threads=1),
        )


@pytest.mark.parametrize(("scope", "sums"), [("model", 3), ("tensor", 0)])
def test_no_histogram_is_kept_longer_than_it_is_needed(
    lab: Any, monkeypatch: pytest.MonkeyPatch, scope: str, sums: int
) -> None:
    flows: list[Flow] = []

    class Kept(Flow):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            super().__init__(*arguments, **more)
            flows.append(self)

    monkeypatch.setattr("mmerge.pipeline.build.run.Flow", Kept)
    build(lab, {"method": "mmer", "scope": scope, "output": "store"}, SerialExecutor(num_threads=1))
    assert len(flows[0].survey.digests) == len(lab.base)
    assert flows[0].survey.histograms == {}
    assert len(flows[0].survey.sums) == sums
