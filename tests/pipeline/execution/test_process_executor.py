"""Builds in processes of the command: the same bytes, one clear line when a process is killed, and
none that lives on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import MmergeError, StoreError
from mmerge.manifests.maintenance.verify import verify
from mmerge.manifests.stores.open import open_store, was_any_opened
from mmerge.pipeline import make_plan, open_executor, read_recipe, run
from mmerge.pipeline.execution.process_executor import ProcessExecutor

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(name="raw")
def make_raw(lab: Any) -> Any:
    """A recipe whose build takes some seconds, and the bytes that it makes."""
    lab.config |= {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "head_dim": 128,
        "num_hidden_layers": 12,
    }
    return lab.make_all()


@pytest.fixture
def executor() -> Iterator[ProcessExecutor]:
    made = open_executor("processes", num_workers=2)
    assert isinstance(made, ProcessExecutor)
    yield made
    made.close()


def start(recipe: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "mmerge.pipeline.cli.main",
        "run",
        str(recipe),
        "--executor",
        "processes",
        "--workers",
        "2",
    ]
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def await_first_shard(process: subprocess.Popen[str]) -> list[int]:
    """Return the worker processes of a run that has finished a shard."""
    assert process.stderr is not None
    for line in process.stderr:
        if re.search(r"scan .*: .* in ", line):
            break
    found = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert len(found) == 2
    return found


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_of_a_program_that_has_opened_stores_give_the_same_bytes(
    lab: Any, executor: ProcessExecutor, digests: Any
) -> None:
    raw = lab.make_all()
    run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "threads"}))))
    assert was_any_opened()
    again = open_executor(
        "processes", num_workers=1
    )  # started anew: a fork would have no threads of the library behind stores
    try:
        for name, chosen in (("processes", executor), ("one", again)):
            report = run(
                make_plan(read_recipe(lab.write_recipe(raw | {"output": name}))), executor=chosen
            )
            assert report.num_computed["merge"] == 5
            verify(str(lab.folder / name)).check()
    finally:
        again.close()
    assert (
        digests(lab.folder / "threads")
        == digests(lab.folder / "processes")
        == digests(lab.folder / "one")
    )


def test_a_store_of_one_process_and_options_of_a_cluster_are_refused(
    lab: Any, executor: ProcessExecutor
) -> None:
    with pytest.raises(StoreError, match="other processes cannot see it"):
        run(
            make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"output": "memory://x"}))),
            executor=executor,
        )
    with pytest.raises(MmergeError, match="--address has no effect with --executor processes"):
        open_executor("processes", address="auto")


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name
)
def test_a_run_that_ends_early_leaves_no_process_and_the_next_one_continues(
    lab: Any, raw: Any, digests: Any, number: signal.Signals
) -> None:
    process = start(lab.write_recipe(raw))
    children = await_first_shard(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    _, rest = process.communicate(timeout=60)
    assert (
        process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    ), rest
    assert "Traceback" not in rest
    await_end(children)
    again = start(lab.write_recipe(raw))
    _, rest = again.communicate(timeout=120)
    assert again.returncode == 0, rest
    assert re.search(r"scan: \d+ shards, [1-9]", rest), (
        "what the first one finished is not made again"
    )
    run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "undisturbed"}))))
    left = [listed.key for listed in open_store(str(lab.folder / "store")).list_partials()]
    assert not left or number == signal.SIGKILL, (
        "only what nobody could tidy up stays, for the collection"
    )
    made = {key: digest for key, digest in digests(lab.folder / "store").items() if key not in left}
    assert made == digests(lab.folder / "undisturbed")


def test_a_worker_that_is_killed_is_named_with_its_shards_and_nothing_is_lost(
    lab: Any, raw: Any
) -> None:
    process = start(lab.write_recipe(raw))
    children = await_first_shard(process)
    os.kill(children[0], signal.SIGKILL)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.search(
        r"error: MmergeError: a worker process was killed.* one of these shards: \S+", rest
    ), rest
    assert "Traceback" not in rest
    await_end(children)
    again = start(lab.write_recipe(raw))
    again.communicate(timeout=120)
    assert again.returncode == 0
    verify(str(lab.folder / "store")).check()
