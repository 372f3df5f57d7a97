"""Run records in a store: numbered, alive or dead, exclusive where requested."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from typing import Any

import pytest
from lost_answers import lose_answers

from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline.build.simulation import Rates, to_rates
from mmerge.pipeline.monitoring import run_records as module
from mmerge.pipeline.monitoring.progress import JsonFormatter, LogProgress
from mmerge.pipeline.monitoring.run_records import (
    PhaseStatus,
    RunRecord,
    RunStatus,
    RunUnderWay,
    begin_run,
    list_runs,
    read_status,
)
from mmerge.workers.task import TaskResult


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(module, "EXPIRY_SECONDS", 1.0)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Store:
    return open_store(f"memory://status-{request.node.name}")


def test_a_run_is_skipped_while_another_lives_and_begins_when_that_has_ended(store: Store) -> None:
    with RunRecord(store, begin_run(store, "omni", exclusive=True)):
        with pytest.raises(RunUnderWay, match="omni: run 1 is under way on"):
            begin_run(store, "omni", exclusive=True)
        assert begin_run(store, "other", exclusive=True).number == 1
        assert begin_run(store, "omni", exclusive=False).number == 2, (
            "somebody at a terminal is not held up"
        )
    assert read_status(store, "omni", 1).state == "finished"


def test_a_dead_run_is_replaced_after_its_expiry(store: Store) -> None:
    dead = begin_run(store, "omni", exclusive=True)
    assert read_status(store, "omni", dead.number).state == "running"
    assert begin_run(store, "omni", exclusive=True).number == 2


def test_a_run_recognises_its_record_though_the_answer_was_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_answers(store, monkeypatch)
    for number in (1, 2):
        assert begin_run(store, "omni", exclusive=False).number == number
    assert list_runs(store, "omni") == [1, 2]


def test_of_two_ticks_at_the_same_moment_one_builds(store: Store) -> None:
    taken: list[int] = []
    skipped: list[RunUnderWay] = []
    gate = threading.Barrier(8)

    def tick() -> None:
        gate.wait()
        try:
            begun = begin_run(store, "omni", exclusive=True)
        except RunUnderWay as other:
            skipped.append(other)
            return
        with RunRecord(store, begun):
            taken.append(begun.number)
            threading.Event().wait(1.5)

    threads = [threading.Thread(target=tick) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert taken == [1]
    assert len(skipped) == 7


def test_the_record_tells_phases_bytes_build_and_failures(store: Store) -> None:
    def fail() -> None:
        with RunRecord(store, begin_run(store, "omni", exclusive=False)) as record:
            record.begin("merge", num_bytes=100, num_tasks=2, num_reused=1)
            record.advance("merge", TaskResult("layers.0", 60, False, 2.0))
            record.fail("merge", "layers.1", ValueError("NaN at [0]"))
            record.name_build("ab" * 32)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    found = read_status(store, "omni", 1)
    assert (found.state, found.message, found.build) == ("failed", "broken", "ab" * 32)
    (phase,) = found.phases.values()
    assert phase == PhaseStatus(
        num_tasks=2,
        num_done=1,
        num_reused=1,
        num_failed=1,
        num_bytes=100,
        bytes_read=60,
        seconds=2.0,
        wall_seconds=phase.wall_seconds,
    )
    assert found.failures == ["merge layers.1: NaN at [0]"]
    assert 0 < phase.wall_seconds <= found.wall_seconds
    phase.wall_seconds = 7.0
    measured = found.model_copy(update={"start_seconds": 4.0, "wall_seconds": 10.0})
    assert to_rates(measured) == Rates(merge=30.0, start_seconds=4.0, phase_seconds=3.0)


def test_old_records_are_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT_RUNS", 3)
    for _ in range(6):
        with RunRecord(store, begin_run(store, "omni", exclusive=False)):
            pass
    assert list_runs(store, "omni") == [4, 5, 6]
    assert len(list(store.list("runs"))) == 6


def test_the_job_is_named_where_ray_gives_its_id(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        json.dumps({"metadata": {"job_submission_id": "mmerge-omni-1"}}),
    )
    assert begin_run(store, "omni", exclusive=False).job == "mmerge-omni-1"


def test_json_lines_hold_phase_shard_and_build(caplog: pytest.LogCaptureFixture) -> None:
    progress = LogProgress()
    with caplog.at_level(logging.INFO, logger="mmerge.run"):
        progress.name_build("cd" * 32)
        progress.advance("merge", TaskResult("layers.0", 60, False, 2.0))
    event = json.loads(JsonFormatter().format(caplog.records[-1]))
    assert event["shard"] == "layers.0"
    assert event["build"] == "cd" * 32
    assert event["phase"] == "merge"
    assert event["num_bytes"] == 60
    assert "layers.0: 60 B in 2.00 s" in event["message"]


def test_the_command_line_records_skips_and_tells(lab: Any) -> None:
    recipe = str(lab.write_recipe(lab.make_all()))

    def mmerge(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mmerge.pipeline.cli.main", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )

    done = mmerge("--log-format", "json", "run", recipe, "--executor", "serial", "--exclusive")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert any(
        line.get("shard") == "layers.1" and line["phase"] == "merge" and len(line["build"]) == 64
        for line in lines
    )
    told = mmerge("status", str(lab.folder / "store"))
    assert told.returncode == 0
    assert "tiny run 1: finished, build" in told.stdout
    store = open_store(str(lab.folder / "store"))
    with RunRecord(store, begin_run(store, "tiny", exclusive=False)):
        skipped = mmerge("run", recipe, "--executor", "serial", "--exclusive")
        assert skipped.returncode == 0
        assert "nothing done: RunUnderWay: tiny: run 2 is under way" in skipped.stdout
        assert (
            json.loads(mmerge("status", f"{lab.folder / 'store'}#tiny", "--json").stdout)[0][
                "state"
            ]
            == "running"
        )
    again = mmerge("run", recipe, "--executor", "serial", "--exclusive")
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert len(list((lab.folder / "store" / "refs" / "tiny").iterdir())) == 1
    planned = mmerge(
        "plan", recipe, "--nodes", "2", "--cores", "4", "--rates-from", str(lab.folder / "store")
    )
    assert planned.returncode == 1, "the last run computed nothing"
    planned = mmerge("plan", recipe, "--nodes", "2", "--cores", "4", "--json")
    assert json.loads(planned.stdout)["simulation"]["num_tasks"] == 21
    assert "RunStatus" not in told.stdout
    assert (
        RunStatus.model_validate({"name": "x", "number": 1, "later": "ignored"}).state == "running"
    )
