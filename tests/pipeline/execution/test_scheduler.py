"""The scheduler over simulated nodes: order, window, deadlines, attempts; and forecasts that follow
from arithmetic.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from mmerge.manifests.errors import MmergeError, NonFiniteError
from mmerge.pipeline import make_plan, read_recipe
from mmerge.pipeline import run as run_plan
from mmerge.pipeline.build.simulation import Rates, simulate
from mmerge.pipeline.execution.cluster import Attempt, Event, Resources
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.scheduler import Policy, dispatch, nothing_follows, resources_of
from mmerge.pipeline.execution.simulated_cluster import Nodes, SimulatedCluster, SimulatedTask
from mmerge.workers.task import TaskResult


def make_task(shard: str, num_bytes: int = 100, peak_bytes: int = 10) -> Any:
    return SimulatedTask(shard, num_bytes, peak_bytes, bytes_out=0, rate=10.0)


@dataclass
class ScriptedCluster:
    """Every attempt takes ten seconds on the next node in turn, unless the script has another end
    for its shard and number.
    """

    script: dict[tuple[str, int], str] = field(default_factory=dict)
    slots: int = 4
    num_nodes: int = 3
    clock: float = 0.0
    log: list[Attempt] = field(default_factory=list)
    cancelled: list[tuple[str, int]] = field(default_factory=list)
    pending: list[tuple[float, int, Event]] = field(default_factory=list)
    swallowed: bool = False
    alive: int = 0
    most: int = 0
    _turn: Any = field(default_factory=itertools.count)

    def now(self) -> float:
        return self.clock

    def num_slots(self, resources: Resources) -> int:
        return self.slots

    def start(self, attempt: Attempt) -> None:
        self.log.append(attempt)
        nodes = [
            f"n{index}" for index in range(self.num_nodes) if f"n{index}" not in attempt.avoid
        ] or ["n0"]
        node = attempt.prefer or nodes[next(self._turn) % len(nodes)]
        if (
            self.script.get((attempt.task.shard, attempt.number)) == "swallowed"
            and not self.swallowed
        ):
            self.swallowed = True
            self.alive += 1
            return
        if (
            self.script.get((attempt.task.shard, attempt.number)) == "undelivered"
            and not self.swallowed
        ):
            self.swallowed = True
            self.alive += 1
            self._add(5, Event(attempt, "undelivered"))
            return
        self._add(0, Event(attempt, "started", node))
        self.alive += 1
        self.most = max(self.most, self.alive)
        end = self.script.get((attempt.task.shard, attempt.number), "finish")
        if end in ("finish", "swallowed", "undelivered"):
            self._add(
                10,
                Event(
                    attempt,
                    "finished",
                    node,
                    result=TaskResult(attempt.task.shard, attempt.task.num_bytes, False, 10.0),
                ),
            )
        elif end == "late":
            self._add(
                95,
                Event(
                    attempt,
                    "finished",
                    node,
                    result=TaskResult(attempt.task.shard, attempt.task.num_bytes, False, 95.0),
                ),
            )
        elif end == "oom":
            self._add(
                5, Event(attempt, "lost", node, error=MmergeError("memory"), out_of_memory=True)
            )
        elif end == "lost":
            self._add(5, Event(attempt, "lost", node, error=MmergeError("worker died")))
        elif end == "bad":
            self._add(5, Event(attempt, "failed", node, error=NonFiniteError("NaN at [0]")))

    def _add(self, seconds: float, event: Event) -> None:
        self.pending.append((self.clock + seconds, next(self._turn), event))
        self.pending.sort(key=lambda found: found[:2])

    def cancel(self, attempt: Attempt) -> None:
        self.cancelled.append((attempt.task.shard, attempt.number))
        self.alive -= 1
        self.pending = [found for found in self.pending if found[2].attempt is not attempt]

    def wait(self, timeout: float | None) -> list[Event]:
        if not self.pending or (timeout is not None and self.pending[0][0] > self.clock + timeout):
            assert timeout is not None, "the scheduler waits for ever"
            self.clock += timeout
            return []
        self.clock, _, event = self.pending.pop(0)
        self.alive -= event.kind not in ("started", "undelivered")
        return [event]


def run(
    tasks: list[Any],
    cluster: Any,
    policy: Policy | None = None,
    nodes: dict[str, str] | None = None,
) -> dict[str, Any]:
    return {
        task.shard: outcome
        for task, outcome in dispatch(tasks, cluster, policy=policy or Policy(), nodes=nodes)
    }


def test_large_tasks_start_first_and_few_are_in_flight() -> None:
    cluster = ScriptedCluster(slots=4)
    found = run([make_task(f"s{size}", num_bytes=size) for size in range(1, 41)], cluster)
    assert len(found) == 40
    assert [attempt.task.num_bytes for attempt in cluster.log] == list(range(40, 0, -1))
    assert cluster.most == 5, "as many as run at once, and one more"


def test_a_lost_attempt_is_repeated_elsewhere_and_fails_with_its_reason_in_the_end() -> None:
    cluster = ScriptedCluster(
        {("a", 1): "lost", **{("b", number): "lost" for number in range(1, 9)}}, num_nodes=9
    )
    found = run([make_task("a"), make_task("b"), make_task("c")], cluster)
    assert isinstance(found["a"], TaskResult)
    assert isinstance(found["b"], MmergeError)
    assert "shard b: 4 attempts were lost, the last one: MmergeError: worker died" in str(
        found["b"]
    )
    first, second = (attempt for attempt in cluster.log if attempt.task.shard == "a")
    assert not first.avoid
    assert len(second.avoid) == 1


def test_an_attempt_that_ran_out_of_memory_gets_twice_as_much() -> None:
    cluster = ScriptedCluster({("a", 1): "oom", ("a", 2): "oom"})
    assert isinstance(run([make_task("a", peak_bytes=10)], cluster)["a"], TaskResult)
    assert [attempt.resources.memory for attempt in cluster.log] == [10, 20, 40]


def test_a_tasks_own_error_is_final_and_the_others_go_on() -> None:
    cluster = ScriptedCluster({("a", 1): "bad"})
    found = run([make_task("a"), make_task("b")], cluster)
    assert isinstance(found["a"], NonFiniteError)
    assert isinstance(found["b"], TaskResult)
    assert [attempt.task.shard for attempt in cluster.log] == ["a", "b"]


def test_a_hanging_attempt_gets_a_second_beside_it_and_the_first_to_end_counts() -> None:
    cluster = ScriptedCluster({("a", 1): "hang"})
    found = run([make_task("a")], cluster, Policy(deadline_seconds=60))
    assert isinstance(found["a"], TaskResult)
    assert cluster.clock == 70, "the deadline and one task"
    assert cluster.cancelled == [("a", 1)]
    assert cluster.log[1].avoid == {"n0"}


def test_an_overdue_attempt_that_ends_first_after_all_counts_and_the_other_is_ended() -> None:
    cluster = ScriptedCluster({("a", 1): "late", ("a", 2): "hang"})
    found = run([make_task("a")], cluster, Policy(deadline_seconds=60))
    assert found["a"].seconds == 95.0
    assert cluster.cancelled == [("a", 2)]


def test_hanging_attempts_do_not_hold_up_the_others() -> None:
    cluster = ScriptedCluster({(f"h{index}", 1): "hang" for index in range(5)}, slots=4)
    found = run(
        [make_task(f"h{index}", num_bytes=200) for index in range(5)] + [make_task("x")],
        cluster,
        Policy(deadline_seconds=60),
    )
    assert all(isinstance(outcome, TaskResult) for outcome in found.values())


def test_a_task_that_always_hangs_fails_with_the_deadline_in_its_error() -> None:
    cluster = ScriptedCluster({("a", number): "hang" for number in range(1, 9)}, num_nodes=9)
    found = run([make_task("a")], cluster, Policy(deadline_seconds=60))
    assert "shard a: 4 attempts took longer than the deadline of 60 s each" in str(found["a"])
    assert sorted(cluster.cancelled) == [("a", number) for number in range(1, 5)]


def test_an_attempt_of_a_lost_node_is_repeated_and_one_that_waits_for_a_core_is_not() -> None:
    cluster = ScriptedCluster({("a", 1): "swallowed"})
    assert isinstance(run([make_task("a")], cluster, Policy(deadline_seconds=60))["a"], TaskResult)
    assert cluster.clock == 70
    assert [attempt.number for attempt in cluster.log] == [1, 1]
    busy = ScriptedCluster({("a", 1): "swallowed", ("long", 1): "late"}, slots=1)
    run([make_task("long", num_bytes=200), make_task("a")], busy, Policy(deadline_seconds=1000))
    assert [attempt.task.shard for attempt in busy.log] == ["long", "a", "a"]
    assert busy.clock >= 1000, "it was left alone while the only core was busy"


def test_a_task_in_transit_to_a_lost_node_is_repeated_and_counts_as_no_attempt() -> None:
    cluster = ScriptedCluster({("a", 1): "undelivered"})
    assert isinstance(
        run([make_task("a")], cluster, Policy(deadline_seconds=60, max_attempts=1))["a"], TaskResult
    )
    assert cluster.clock == 15
    assert [attempt.number for attempt in cluster.log] == [1, 1]
    assert cluster.cancelled == [("a", 1)]


def test_a_node_where_an_attempt_is_overdue_gets_nothing_new_until_it_is_heard_of() -> None:
    others = [make_task(f"s{index}") for index in range(40)]
    cluster = ScriptedCluster(
        {("a", 1): "late", ("a", 2): "hang", ("a", 3): "hang"}, slots=2, num_nodes=4
    )
    nodes = (
        {"a": "n0"}
        | {task.shard: "n1" for task in others[:20]}
        | {task.shard: "n0" for task in others[20:]}
    )
    run([make_task("a", num_bytes=200), *others], cluster, Policy(deadline_seconds=35), nodes=nodes)
    second = next(index for index, attempt in enumerate(cluster.log) if attempt.number == 2)
    assert not any(attempt.avoid for attempt in cluster.log[:second])
    assert all(
        "n0" in attempt.avoid and attempt.prefer != "n0"
        for attempt in cluster.log[second : second + 5]
    )
    assert cluster.log[-1].prefer == "n0", "it has ended its attempt after all"


def test_the_deadline_follows_what_the_others_took() -> None:
    cluster = ScriptedCluster({("slow", 1): "hang"}, slots=8)
    run(
        [make_task(f"s{index}", num_bytes=300) for index in range(6)]
        + [make_task("slow", num_bytes=600)],
        cluster,
    )
    second = next(attempt for attempt in cluster.log if attempt.number == 2)
    assert second.task.shard == "slow"
    assert cluster.clock == pytest.approx(6 * 20 + 10), (
        "six times what its bytes take elsewhere, then one task"
    )


def test_the_base_copy_and_the_merge_of_a_layer_prefer_the_node_that_read_it() -> None:
    nodes: dict[str, str] = {}
    run([make_task("layers.0"), make_task("layers.1")], ScriptedCluster(), nodes=nodes)
    later = ScriptedCluster()
    run(
        [make_task("layers.0"), make_task("base/layers.1"), make_task("carry/x")],
        later,
        nodes=nodes,
    )
    assert [(attempt.task.shard, attempt.prefer) for attempt in later.log] == [
        ("layers.0", nodes["layers.0"]),
        ("base/layers.1", nodes["layers.1"]),
        ("carry/x", None),
    ]


@dataclass(frozen=True)
class Following(SimulatedTask):
    """Another kind of task."""


def test_what_follows_a_task_begins_before_what_waits_on_the_node_that_read_it() -> None:
    def follow(task: Any, result: TaskResult) -> list[Any]:
        return (
            []
            if isinstance(task, Following)
            else [Following(task.shard, task.num_bytes, 500, bytes_out=0, rate=10.0)]
        )

    cluster = ScriptedCluster(slots=1)
    nodes: dict[str, str] = {}
    tasks = [make_task(f"s{index}", num_bytes=1000 - index) for index in range(8)]
    found = list(dispatch(tasks, cluster, policy=Policy(), nodes=nodes, follow=follow))
    assert len(found) == 16
    order = [(isinstance(attempt.task, Following), attempt.task.shard) for attempt in cluster.log]
    assert order[:6] == [
        (False, "s0"),
        (False, "s1"),
        (True, "s0"),
        (True, "s1"),
        (False, "s2"),
        (False, "s3"),
    ]
    assert all(
        attempt.prefer == nodes[attempt.task.shard]
        for attempt in cluster.log
        if isinstance(attempt.task, Following)
    )
    assert {
        attempt.resources.memory for attempt in cluster.log if isinstance(attempt.task, Following)
    } == {500}


def test_the_deadline_of_a_slow_phase_does_not_follow_from_a_quick_one() -> None:
    def follow(task: Any, result: TaskResult) -> list[Any]:
        late = Following("late", 1000, 10, bytes_out=0, rate=10.0, phase="merge")
        return [late] if task.shard == "s0" else []

    cluster = ScriptedCluster({("late", 1): "late"}, slots=8)
    tasks = [make_task(f"s{index}", num_bytes=1000) for index in range(4)]
    found = list(
        dispatch(tasks, cluster, policy=Policy(slowest_bytes_per_second=10.0), follow=follow)
    )
    assert len(found) == 5
    assert {attempt.number for attempt in cluster.log} == {1}, (
        "ninety-five seconds, where its bytes take ten in another phase"
    )


def test_leaving_early_cancels_what_runs() -> None:
    cluster = ScriptedCluster()
    outcomes = dispatch([make_task(f"s{index}") for index in range(10)], cluster, policy=Policy())
    next(outcomes)
    outcomes.close()
    assert len(cluster.cancelled) == cluster.most - 1
    assert cluster.alive == 0


def test_a_task_takes_its_peak_and_a_gpu_where_the_recipe_says_so(lab: Any) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"method": "tsv"})))
    tasks: list[Any] = []

    class Watching(SerialExecutor):
        def run(self, first_tasks: Any, store_uri: str, follow: Any = nothing_follows) -> Any:
            tasks.extend(first_tasks)

            def follow_and_note(task: Any, result: TaskResult) -> Any:
                followers = follow(task, result)
                tasks.extend(followers)
                return followers

            return super().run(first_tasks, store_uri, follow_and_note)

    run_plan(plan, executor=Watching())
    merge = next(task for task in tasks if type(task).__name__ == "MergeTask")
    assert resources_of(merge) == Resources(num_cpus=1, num_gpus=0, memory=merge.peak_bytes)
    method_parameters = tuple(
        replace(found, parameters=found.parameters | {"device": "cuda"})
        for found in merge.method_parameters
    )
    assert resources_of(replace(merge, method_parameters=method_parameters)).num_gpus == 1
    assert resources_of(tasks[0]).num_gpus == 0


@pytest.mark.parametrize(
    ("nodes", "seconds", "limit"),
    [
        (Nodes(1, 1, 1e9, 1e9), 80.0, "cores"),
        (Nodes(2, 2, 1e9, 1e9), 20.0, "cores"),
        (Nodes(2, 2, 5.0, 1e9), 80.0, "reading"),
        (Nodes(20, 1, 1e9, 1e9), 10.0, "too few shards"),
    ],
)
def test_simulated_time_is_that_of_arithmetic(nodes: Nodes, seconds: float, limit: str) -> None:
    cluster = SimulatedCluster(nodes, task_seconds=0)
    run(
        [make_task(f"s{index}") for index in range(8)],
        cluster,
        Policy(deadline_seconds=float("inf")),
    )
    cluster.update_accounts()
    assert cluster.now() == pytest.approx(seconds)
    assert max(cluster.lost, key=lambda found: cluster.lost[found]) == limit  # type: ignore[call-overload]


def test_equal_nodes_that_are_done_at_the_same_moment_get_equal_shares_of_what_is_left() -> None:
    cluster = SimulatedCluster(Nodes(2, 8, 40.0, 1e9), task_seconds=0)
    run(
        [make_task(f"s{index}") for index in range(24)],
        cluster,
        Policy(deadline_seconds=float("inf")),
    )
    assert [machine.bytes_read for machine in cluster.machines] == [1200.0, 1200.0]
    assert cluster.now() == pytest.approx(30.0), (
        "three times what eight tasks take of one node's reading"
    )


def test_memory_bounds_how_many_tasks_a_node_runs_at_once() -> None:
    cluster = SimulatedCluster(Nodes(1, 8, 1e9, 1e9, memory=25), task_seconds=0)
    run(
        [make_task(f"s{index}", peak_bytes=10) for index in range(8)],
        cluster,
        Policy(deadline_seconds=float("inf")),
    )
    assert cluster.machines[0].peak_memory == 20
    assert cluster.now() == pytest.approx(40.0)


def test_a_forecast_counts_every_byte_of_the_plan_and_halves_with_twice_the_nodes(
    lab: Any,
) -> None:
    lab.config |= {"num_hidden_layers": 16}
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all())))
    rates = Rates(scan=1e5, merge=1e5, copy=1e5, task_seconds=0, phase_seconds=0, start_seconds=0)
    one = simulate(plan, Nodes(1, 1, 1e12, 1e12), rates=rates)
    copied = sum(shard.num_bytes for shard in plan.copy_shards)
    merged = sum(shard.bytes_in for shard in plan.merge_shards)
    assert one.bytes_read_per_node == plan.bytes_in + merged + copied
    assert one.bytes_written_per_node == plan.bytes_out
    assert one.seconds == pytest.approx((plan.bytes_in + merged + copied) / 1e5)
    assert one.limit == "cores"
    assert one.memory_per_node == plan.peak_bytes
    assert simulate(
        plan, one.nodes, rates=replace(rates, start_seconds=3)
    ).seconds == pytest.approx(one.seconds + 3)
    two = simulate(plan, Nodes(2, 1, 1e12, 1e12), rates=rates)
    assert one.seconds / 2 <= two.seconds < one.seconds / 1.7
    assert simulate(plan, Nodes(1, 1, 1e12, 100.0), rates=rates).limit == "writing"
    assert simulate(plan, Nodes(256, 32, 1e12, 1e12), rates=rates).limit == "too few shards"
    with pytest.raises(MmergeError, match="a node has"):
        simulate(plan, replace(one.nodes, memory=1000), rates=rates)
