"""Many nodes: tasks are spread over them, and whatever dies, the build ends with the same bytes."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from mmerge.manifests.errors import TaskErrors
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.pipeline.execution.scheduler import Policy, nothing_follows

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def connected(ray_nodes: Any, script: Any) -> Iterator[Any]:
    """This process as a driver, its workers with the test's faults."""
    import ray

    hook = {"worker_process_setup_hook": script.make_hook()}
    ray.init(
        address=ray_nodes.address, runtime_env=hook, log_to_driver=False, logging_level="ERROR"
    )
    yield ray_nodes
    ray.shutdown()


def make_tiny_plan(lab: Any, raw: dict[str, Any], output: str = "store") -> Any:
    return make_plan(read_recipe(lab.write_recipe(raw | {"output": output}, f"{output}.yaml")))


def test_tasks_are_spread_over_nodes_and_the_bytes_are_those_of_a_serial_run(
    lab: Any, connected: Any, faults: Any, undisturbed: tuple[Any, dict[str, str]], digests: Any
) -> None:
    raw, expected = undisturbed
    faults.set("all", "slow")
    run(make_tiny_plan(lab, raw), executor=RayExecutor())
    assert digests(lab.folder / "store") == expected
    verify(str(lab.folder / "store")).check()
    begun = faults.events()
    per_node = Counter(event["node"] for event in begun)
    assert len(per_node) == 3
    assert max(per_node.values()) <= len(begun) / 2, per_node
    running, most = 0, 0
    marks = sorted(
        [(event["time"], 1) for event in begun]
        + [(event["time"], -1) for event in faults.events(kind="end")]
    )
    for _, step in marks:
        running += step
        most = max(most, running)
    assert most <= 6, "no more tasks at once than cores"


def test_a_merge_runs_where_its_inputs_were_scanned(
    lab: Any, connected: Any, faults: Any, undisturbed: tuple[Any, dict[str, str]], digests: Any
) -> None:
    raw, _ = undisturbed
    again: list[bool] = []
    # Tasks take milliseconds: in a single build the preferred node may always be busy.
    for build in range(3):
        before = len(faults.events())
        run(make_tiny_plan(lab, raw, f"store{build}"), executor=RayExecutor())
        places: dict[str, list[str]] = {}
        for event in faults.events()[before:]:
            places.setdefault(event["shard"].removeprefix("base/"), []).append(event["node"])
        again += [node == nodes[0] for nodes in places.values() for node in nodes[1:]]
    assert sum(again) >= 0.6 * len(again), "warm caches are preferred, though never waited for"


def test_a_killed_worker_costs_one_attempt_elsewhere(
    lab: Any, connected: Any, faults: Any, undisturbed: tuple[Any, dict[str, str]], digests: Any
) -> None:
    raw, expected = undisturbed
    faults.set("layers.2", "kill")
    run(make_tiny_plan(lab, raw), executor=RayExecutor())
    assert digests(lab.folder / "store") == expected
    first, second = faults.events(shard="layers.2")[:2]
    assert first["node"] != second["node"]


def test_an_attempt_over_its_deadline_gets_a_second_elsewhere(
    lab: Any, connected: Any, faults: Any, undisturbed: tuple[Any, dict[str, str]], digests: Any
) -> None:
    raw, expected = undisturbed
    plan = make_tiny_plan(lab, raw)
    run(
        make_tiny_plan(lab, raw, "warm"), executor=RayExecutor()
    )  # workers are there: what is measured is the deadline
    faults.set("layers.3", "wait")
    before = len(faults.events(shard="layers.3"))
    began = time.monotonic()
    run(plan, executor=RayExecutor(policy=Policy(deadline_seconds=3)))
    assert time.monotonic() - began < 12, "within the deadline and one task"
    assert digests(lab.folder / "store") == expected
    first, second = faults.events(shard="layers.3")[before : before + 2]
    assert first["node"] != second["node"]
    assert second["time"] - first["time"] >= 2.5


def test_sigkill_of_a_raylet_in_mid_task_ends_with_the_same_bytes(
    lab: Any, connected: Any, faults: Any, undisturbed: tuple[Any, dict[str, str]], digests: Any
) -> None:
    import threading

    raw, expected = undisturbed
    faults.set("layers.1", "wait")
    failures: list[BaseException] = []

    def build() -> None:
        try:
            run(make_tiny_plan(lab, raw), executor=RayExecutor())
        except BaseException as error:  # noqa: BLE001 - reported by the test's own thread
            failures.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        first = faults.await_event(shard="layers.1")
        connected.kill_raylet(connected.find(first["node"]))
        thread.join(90)
    finally:
        faults.release()
        thread.join(30)
        connected.nodes.append(connected.add())
    assert not failures, failures
    assert digests(lab.folder / "store") == expected
    assert faults.events(shard="layers.1")[1]["node"] != first["node"]


def test_a_bad_tensor_in_each_of_two_experts_is_reported_at_the_end_and_other_shards_are_kept(
    lab: Any, connected: Any
) -> None:
    raw = lab.make_all()

    def spoil(name: str, value: float) -> Any:
        return lambda tensors: tensors[name].view(-1).__setitem__(0, value)

    lab.make_expert(
        "audio", 1, change=spoil("language_model.model.layers.1.mlp.up_proj.weight", float("nan"))
    )
    lab.make_expert("video", 2, change=spoil("multi_modal_projector.linear_1.weight", float("inf")))
    with pytest.raises(TaskErrors) as caught:
        run(make_tiny_plan(lab, raw), executor=RayExecutor())
    assert len(caught.value.failures) == 2
    assert "up_proj" in str(caught.value)
    assert "linear_1" in str(caught.value)
    assert len(list((lab.folder / "store" / "surveys").iterdir())) == 6
    assert not list((lab.folder / "store").glob("builds/*/manifest.json"))


def test_only_keys_and_entries_travel_through_the_driver(lab: Any, ray_nodes: Any) -> None:
    lab.config |= {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": 2000}
    plan = make_tiny_plan(lab, lab.make_all())
    sizes: list[int] = []

    class Watching(SerialExecutor):
        def run(
            self, tasks: Any, store_uri: str, follow: Any = nothing_follows
        ) -> Generator[Any, None, None]:
            for task, outcome in super().run(tasks, store_uri, follow):
                sizes.extend((len(pickle.dumps(task)), len(pickle.dumps(outcome))))
                yield task, outcome

    run(plan, executor=Watching())
    assert len(sizes) > 20
    assert max(sizes) < 50_000 < plan.bytes_in / 20, (
        "a task and its result stay below what Ray puts into its object store"
    )
