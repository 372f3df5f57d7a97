"""Memory is stated before it is used, held, and does not depend on the size of a tensor."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import MmergeError, RecipeError
from mmerge.pipeline import make_plan, read_recipe
from mmerge.pipeline.cli.options import parse_size
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.open import open_executor
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.pipeline.execution.worker_pool import run_in_threads
from mmerge.pipeline.planning.memory_bounds import PROCESS_BYTES
from mmerge.pipeline.planning.shards import MAX_PIECE_BYTES
from mmerge.workers.task import TaskResult

WORKER = """
import json, resource, sys, threading, time
from pathlib import Path
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.execution.executor import SerialExecutor
plan = make_plan(read_recipe(Path(sys.argv[1])))
# Loads everything that is loaded only once.
run(make_plan(read_recipe(Path(sys.argv[2]))), executor=SerialExecutor(num_threads=1))
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(fields["RssAnon"].split()[0]) * 1024
before, peak, stop = resident(), 0, False
def sample():
    global peak
    while not stop:
        peak = max(peak, resident())
        time.sleep(0.002)
thread = threading.Thread(target=sample)
thread.start()
run(plan, executor=SerialExecutor(num_threads=1))
stop = True
thread.join()
print(json.dumps({"before": before, "peak": peak, "planned": plan.peak_bytes}))
"""


def measure(lab: Any, raw: dict[str, Any], vocabulary: int) -> dict[str, int]:
    lab.config |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 300}
    small = lab.write_recipe(lab.make_all() | raw | {"output": "warm"}, "warm.yaml")
    lab.folder = lab.folder / f"large{vocabulary}"
    lab.config |= {"vocab_size": vocabulary}
    large = lab.write_recipe(lab.make_all() | raw, "large.yaml")
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(large), str(small)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("method", ["mmer", "breadcrumbs"])
def test_a_task_takes_no_more_than_was_planned_and_a_large_tensor_no_more_than_a_small_one(
    lab: Any, method: str
) -> None:
    folder = lab.folder
    found = {}
    for vocabulary in (40_000, 320_000):
        lab.folder = folder / str(vocabulary)
        lab.folder.mkdir()
        found[vocabulary] = measure(lab, {"method": method}, vocabulary)
    taken = {size: numbers["peak"] - numbers["before"] for size, numbers in found.items()}
    assert all(taken[size] <= found[size]["planned"] for size in taken), found
    # Eight times the entries: only the packed masks of one piece may grow, up to a piece's size.
    masks = 3 * (320_000 - 40_000) * 64 // 8 if method == "mmer" else 0
    assert taken[320_000] <= taken[40_000] + masks + (24 << 20), taken
    assert found[320_000]["planned"] <= found[40_000]["planned"] + masks


@pytest.mark.parametrize("method", ["mmer", "breadcrumbs", "sce"])
def test_the_plan_of_a_tensor_of_gigabytes_needs_no_more_memory_than_a_piece(
    lab: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = lab.make_all() | {"method": method}
    monkeypatch.setattr("mmerge.pipeline.planning.shards.MAX_PIECE_BYTES", 400)
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    pieces = [
        tensor
        for shard in plan.merge_shards
        for tensor in shard.tensors
        if tensor.name == "model.embed_tokens.weight"
    ]
    assert (len(pieces) > 1) == (method == "mmer"), "what must see a whole tensor streams over it"
    assert all(
        len({tensor.name for tensor in shard.tensors}) == len(shard.tensors)
        for shard in plan.merge_shards
    )
    assert plan.peak_bytes < 400 << 20
    assert MAX_PIECE_BYTES // 2 // 8 * 3 < 64 << 20, "the masks of a piece in bfloat16"


def test_a_method_that_must_see_whole_tensors_streams_unless_the_recipe_needs_its_stages(
    lab: Any,
) -> None:
    lab.config |= {"vocab_size": 4000, "hidden_size": 256, "head_dim": 64}
    raw = lab.make_all() | {"method": "breadcrumbs_ties"}
    streamed = make_plan(read_recipe(lab.write_recipe(raw)))
    measured = make_plan(read_recipe(lab.write_recipe(raw | {"zero_sign": "majority"})))
    num_entries = 4000 * 256
    assert measured.peak_bytes > num_entries * 4 * 8
    assert streamed.peak_bytes < measured.peak_bytes - num_entries * 4 * 8


def test_more_experts_than_kernels_are_compiled_for_are_planned_as_whole_tensors(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.config |= {"vocab_size": 4000, "hidden_size": 256, "head_dim": 64}
    recipe = read_recipe(lab.write_recipe(lab.make_all(3) | {"method": "breadcrumbs"}))
    streamed = make_plan(recipe).peak_bytes
    monkeypatch.setattr("mmerge.pipeline.planning.memory_bounds.MAX_COMPILED_EXPERTS", 2)
    assert make_plan(recipe).peak_bytes > streamed + 4000 * 256 * 4 * 8


def test_less_memory_gives_smaller_blocks_and_too_little_is_refused(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks that take more than the histograms of the scan.
    monkeypatch.setattr("mmerge.pipeline.planning.plan.DEFAULT_BLOCK_ENTRIES", 1 << 20)
    lab.config |= {"hidden_size": 256, "head_dim": 64, "vocab_size": 4000}
    recipe = read_recipe(lab.write_recipe(lab.make_all() | {"method": "ram"}))
    roomy = make_plan(recipe)
    tight = make_plan(recipe, memory_bytes=PROCESS_BYTES + roomy.peak_bytes - 1)
    assert tight.block_entries == roomy.block_entries // 2
    assert tight.peak_bytes < roomy.peak_bytes
    with pytest.raises(RecipeError, match="--memory: the largest task needs"):
        make_plan(recipe, memory_bytes=PROCESS_BYTES)


def test_memory_limits_how_many_tasks_run_at_once(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all())))
    running: list[str] = []
    most = [0]

    def run_task(task: Any, uri: str, *, commits: bool) -> TaskResult:
        assert not commits
        running.append(task.name)
        most[0] = max(most[0], len(running))
        time.sleep(0.02)
        running.remove(task.name)
        return TaskResult(task.name, 0, False, 0.0)

    monkeypatch.setattr("mmerge.pipeline.execution.worker_pool.run_task", run_task)
    shards: Any = plan.merge_shards
    assert len(
        list(run_in_threads(shards, "memory://x", num_threads=4, memory_bytes=plan.peak_bytes))
    ) == len(shards)
    assert most[0] == 1
    assert len(list(run_in_threads(shards, "memory://x", num_threads=4, memory_bytes=None))) == len(
        shards
    )
    assert most[0] > 1
    serial = open_executor(
        "serial", num_workers=3, memory_bytes=PROCESS_BYTES + 5, peak_bytes=plan.peak_bytes
    )
    assert isinstance(serial, SerialExecutor)
    assert (serial.num_threads, serial.memory_bytes) == (3, 5)
    ray = open_executor(
        "ray",
        num_workers=8,
        memory_bytes=3 * (PROCESS_BYTES + plan.peak_bytes),
        peak_bytes=plan.peak_bytes,
    )
    assert isinstance(ray, RayExecutor)
    assert ray.num_workers == 3
    with pytest.raises(MmergeError, match="--memory has no effect with --address"):
        open_executor("ray", address="auto", memory_bytes=1 << 30)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("1.5GB", 1_500_000_000), ("800 MB", 800_000_000), ("2GiB", 2 << 30)]
)
def test_sizes_are_read_with_their_units(text: str, num_bytes: int) -> None:
    assert parse_size(text, option="--memory") == num_bytes


def test_a_size_without_unit_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected a size such as"):
        parse_size("12", option="--memory")
