"""A task that takes more memory than its node has is ended by Ray's monitor, and repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.execution.ray_executor import RayExecutor


@pytest.mark.ray
def test_a_task_that_eats_the_nodes_memory_is_ended_and_repeated_with_the_same_bytes(
    lab: Any,
    undisturbed: tuple[Any, dict[str, str]],
    faults: Any,
    make_ray_nodes: Any,
    digests: Any,
) -> None:
    import ray

    raw, expected = undisturbed
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(meminfo[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    if free < 8 << 20:
        pytest.skip("needs 8 GiB of free memory")
    # The threshold lies 4 GiB above what everybody on this host uses now: only the task that eats
    # reaches it.
    threshold = (total - free + (4 << 20)) / total
    nodes = make_ray_nodes(
        num_nodes=2,
        system_config={"memory_usage_threshold": threshold, "memory_monitor_refresh_ms": 100},
    )
    hook = {"worker_process_setup_hook": faults.make_hook()}
    ray.init(address=nodes.address, runtime_env=hook, log_to_driver=False, logging_level="ERROR")
    faults.set("layers.3", "eat")
    run(make_plan(read_recipe(lab.write_recipe(raw))), executor=RayExecutor())
    attempts = [event for event in faults.events() if event["shard"] == "layers.3"]
    assert attempts[0]["pid"] not in {
        event["pid"] for event in faults.events(kind="end") if event["shard"] == "layers.3"
    }
    assert len(attempts) >= 2
    assert digests(lab.folder / "store") == expected
