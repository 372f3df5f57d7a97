"""A driver that is killed, interrupted or stopped in mid-build: nothing lives on, nothing half-made
has a name, the next run continues.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmerge.pipeline.execution.jobs import Jobs

pytestmark = pytest.mark.ray
NUM_NODES = 1  # every driver starts workers of its own, and each of those takes seconds to start
HELD = ("base/layers.0", "base/layers.4")
"""Copies are the last tasks of a build: what is merged is in the store when these are held."""


def hold(faults: Any) -> None:
    for shard in HELD:
        faults.set(shard, "wait")


def await_held(faults: Any) -> None:
    for shard in HELD:
        faults.await_event(shard=shard, seconds=240)


def check_interrupted(
    store: Path, *, state: str, found: dict[str, str], expected: dict[str, str]
) -> None:
    """Check that the run record has an end, no lease is left, and every object is complete."""
    (record,) = (store / "runs" / "tiny").glob("*.status.json")
    assert json.loads(record.read_text())["state"] == state
    assert 0 < len(found) < len(expected)
    assert found.items() <= expected.items()
    assert not list(store.glob("builds/*/manifest.json"))
    if state == "interrupted":
        assert not [path for path in (store / "claims").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name
)
def test_a_driver_that_ends_leaves_no_orphan_and_the_next_one_continues(
    lab: Any,
    ray_nodes: Any,
    faults: Any,
    undisturbed: tuple[Any, dict[str, str]],
    digests: Any,
    number: signal.Signals,
    drive: Any,
) -> None:
    raw, expected = undisturbed
    hold(faults)
    process = drive(ray_nodes.address, raw)
    try:
        await_held(faults)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=30)
        assert (
            process.returncode
            == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        ), output
        faults.await_end_of_workers()
    finally:
        process.kill()
    state = "running" if number == signal.SIGKILL else "interrupted"
    store = lab.folder / "store"
    check_interrupted(store, state=state, found=digests(store), expected=expected)
    if number == signal.SIGKILL:
        again = drive(ray_nodes.address, raw)
        output, _ = again.communicate(timeout=120)
        assert again.returncode == 0, output
        assert "there already" in output
        assert digests(store) == expected


def test_ray_job_stop_leaves_no_orphan_and_the_next_submission_continues_at_once(
    lab: Any,
    ray_nodes: Any,
    faults: Any,
    undisturbed: tuple[Any, dict[str, str]],
    digests: Any,
    tmp_path: Path,
) -> None:
    import cloudpickle

    raw, expected = undisturbed
    hold(faults)
    hook = tmp_path / "hooks" / "mmerge_test_hook.py"
    hook.parent.mkdir()
    hook.write_text(
        "import cloudpickle\ninstall ="
        f" cloudpickle.loads({cloudpickle.dumps(faults.make_hook())!r})\n"
    )
    jobs = Jobs(ray_nodes.dashboard)
    submit_job = jobs._client.submit_job

    def submit_with_faults(*, runtime_env: dict[str, Any], **options: Any) -> Any:
        more = {
            "env_vars": {"PYTHONPATH": str(hook.parent)},
            "worker_process_setup_hook": "mmerge_test_hook.install",
        }
        return submit_job(runtime_env=runtime_env | more, **options)

    jobs._client.submit_job = submit_with_faults
    recipe = lab.write_recipe(raw)
    job, _ = jobs.submit(recipe, options=[])
    try:
        await_held(faults)
    except pytest.fail.Exception:
        pytest.fail(f"{jobs.find(job.id)}: {jobs._client.get_job_logs(job.id)} {faults.events()}")
    driver = int(
        json.loads(
            next((lab.folder / "store" / "runs" / "tiny").glob("*.status.json")).read_text()
        )["pid"]
    )
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "job",
        "stop",
        job.id,
        "--address",
        ray_nodes.dashboard,
    ]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    stopped = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert stopped.returncode == 0, stopped.stderr
    assert jobs.find(job.id).status == "STOPPED"
    faults.await_end_of_workers(driver)
    store = lab.folder / "store"
    check_interrupted(store, state="interrupted", found=digests(store), expected=expected)
    jobs._client.submit_job = submit_job
    again, is_new = jobs.submit(recipe, options=["--exclusive"])
    assert is_new
    assert jobs.follow(again.id, lambda text: None).status == "SUCCEEDED"
    assert digests(store) == expected
