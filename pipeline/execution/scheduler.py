"""Schedules tasks over a `Cluster`: large ones first, a bounded window, deadlines, new attempts.

The scheduler only decides. The Ray executor gives it a real cluster, the simulation one with a
simulated clock.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.execution.cluster import Attempt, Cluster, Event, Resources
from mmerge.workers.task import AnswerTask, MergeTask, Task, TaskResult

Outcome = tuple[Task, TaskResult | Exception]
Outcomes = Generator[Outcome, None, None]
"""Tasks with their results in the order in which they end.

A caller that stops early closes the generator, which ends the running tasks.
"""
Follow = Callable[[Task, TaskResult], Sequence[Task]]
"""Returns the tasks that become ready when a task has ended with a result."""


def nothing_follows(task: Task, result: TaskResult) -> Sequence[Task]:
    """Return no tasks, for runs of independent tasks."""
    return ()


@dataclass(frozen=True)
class Policy:
    """Deadlines and attempts of a schedule; they have no effect on the bytes of the result."""

    deadline_seconds: float | None = None
    """Limit for one attempt; None: estimated from the tasks that have ended."""
    min_deadline_seconds: float = 60.0
    deadline_factor: float = 6.0
    """Limit for an attempt's duration, as a multiple of that expected from finished tasks."""
    slowest_bytes_per_second: float = 10e6
    """Assumed rate until a task of the phase has ended."""
    max_attempts: int = 4


def resources_of(task: Task) -> Resources:
    """Return the resources of a task: one core, its `peak_bytes`, and a GPU where it asks for one.

    A merge asks for a GPU by the parameter `device: cuda`, an answer task by its device.
    """
    on_gpu = isinstance(task, MergeTask) and any(
        parameters.parameters.get("device") == "cuda" for parameters in task.method_parameters
    )
    on_gpu = on_gpu or (isinstance(task, AnswerTask) and task.device.startswith("cuda"))
    return Resources(num_cpus=1, num_gpus=1.0 if on_gpu else 0.0, memory=task.peak_bytes)


def dispatch(
    tasks: Sequence[Task],
    cluster: Cluster,
    *,
    policy: Policy,
    nodes: dict[str, str] | None = None,
    follow: Follow = nothing_follows,
) -> Outcomes:
    """Yield each task with its result or its error, in the order in which they end.

    Args:
        tasks: tasks without effects outside the store, so that two attempts of one task may run
            concurrently.
        cluster: where the tasks run.
        policy: deadlines and attempts.
        nodes: by shard, the node that has read it and whose caches are warm; updated during the
            run.
        follow: returns the tasks that follow from a task with a result; they start before all
            waiting tasks.
    """
    warm_nodes = nodes if nodes is not None else {}
    yield from _Dispatch(tasks, cluster, policy=policy, nodes=warm_nodes, follow=follow).run()


@dataclass
class _State:
    """State of one unfinished task."""

    task: Task
    num_started: int = 0
    memory: int = 0
    avoid: set[str] = field(default_factory=set)
    running: list[_Running] = field(default_factory=list)

    def find(self, attempt: Attempt) -> _Running | None:
        """Return the record of a running attempt, None when it is not of this task."""
        for running in self.running:
            if running.attempt is attempt:
                return running
        return None


@dataclass
class _Running:
    attempt: Attempt
    submitted: float
    started: float | None = None
    node: str = ""
    is_overdue: bool = False


class _Dispatch:
    def __init__(
        self,
        tasks: Sequence[Task],
        cluster: Cluster,
        *,
        policy: Policy,
        nodes: dict[str, str],
        follow: Follow,
    ) -> None:
        self.cluster, self.policy, self.nodes, self.follow = cluster, policy, nodes, follow
        # Large tasks first: a large task that starts last would run alone at the end.
        ordered = sorted(tasks, key=lambda task: -task.num_bytes)
        self.states = {id(task): _State(task, memory=task.peak_bytes) for task in ordered}
        self.waiting: deque[_State] = deque(self.states.values())
        self.largest: Resources | None = None
        self._note_sizes(tasks)
        self.rates: dict[str, list[float]] = {}
        """Bytes per second by phase: a merge may take many times as long as a scan."""
        self.last_start = 0.0
        self.silent: set[str] = set()
        """Nodes without an event since an attempt there was overdue.

        They may be unreachable before the cluster has declared them dead.
        """

    def run(self) -> Iterator[Outcome]:
        try:
            while self.states:
                self._start_waiting()
                for event in self.cluster.wait(self._seconds_to_next_deadline()):
                    outcome = self._take(event)
                    if outcome is not None:
                        if isinstance(outcome[1], TaskResult):
                            self._add_followers(outcome[0], outcome[1])
                        yield outcome
                yield from self._check_deadlines()
        finally:
            # Attempts remain only after an error, after Ctrl-C, or where another attempt finished
            # the task. Cancel them, so that no orphan keeps running.
            for state in self.states.values():
                for running in state.running:
                    self.cluster.cancel(running.attempt)

    def _note_sizes(self, tasks: Sequence[Task]) -> None:
        sizes = [resources_of(task) for task in tasks]
        if self.largest is not None:
            sizes.append(self.largest)
        self.largest = max(sizes, key=lambda size: (size.num_gpus, size.memory), default=None)

    def _add_followers(self, task: Task, result: TaskResult) -> None:
        followers = self.follow(task, result)
        states = [_State(follower, memory=follower.peak_bytes) for follower in followers]
        self.states |= {id(state.task): state for state in states}
        self.waiting.extendleft(reversed(states))
        self._note_sizes(followers)

    def _num_running(self) -> int:
        # Overdue attempts do not count: attempts that hang must not block the waiting tasks.
        return sum(
            not running.is_overdue for state in self.states.values() for running in state.running
        )

    def _num_slots(self) -> int:
        assert self.largest is not None
        return max(1, self.cluster.num_slots(self.largest))

    def _window(self) -> int:
        slots = self._num_slots()
        # Slightly more than can run: the next task is on its node when a core becomes free.
        return slots + max(1, slots // 8)

    def _start_waiting(self) -> None:
        if not self.waiting:
            return
        free = self._window() - self._num_running()
        while self.waiting and free > 0:
            self._start(self.waiting.popleft())
            free -= 1

    def _start(self, state: _State) -> None:
        state.num_started += 1
        warm_node = self.nodes.get(_place_of(state.task))
        avoid = frozenset(state.avoid | self.silent)
        resources = resources_of(state.task)
        attempt = Attempt(
            task=state.task,
            number=state.num_started,
            resources=Resources(resources.num_cpus, resources.num_gpus, state.memory),
            avoid=avoid,
            prefer=warm_node if warm_node not in avoid else None,
        )
        state.running.append(_Running(attempt, submitted=self.cluster.now()))
        self.cluster.start(attempt)

    def _take(self, event: Event) -> Outcome | None:
        state = self.states.get(id(event.attempt.task))
        running = state.find(event.attempt) if state else None
        if state is None or running is None:
            # Another attempt ended first; this one wrote the same bytes under the same keys.
            return None
        if event.kind == "started":
            running.started = self.last_start = self.cluster.now()
            running.node = event.node
            self.silent.discard(event.node)
            return None
        if event.kind == "undelivered":
            self._restart(state, running)
            return None
        state.running.remove(running)
        if event.kind != "lost":
            self.silent.discard(running.node)
        if event.kind == "finished" and event.result is not None:
            self._learn(running, event.result)
            return self._finish(state, event.result)
        if event.kind == "failed" and event.error is not None:
            return self._finish(state, event.error)
        return self._lose(state, running, event)

    def _learn(self, running: _Running, result: TaskResult) -> None:
        self.nodes[_place_of(running.attempt.task)] = running.node
        if result.num_bytes and running.started is not None:
            rate = result.num_bytes / max(self.cluster.now() - running.started, 1e-3)
            self.rates.setdefault(running.attempt.task.phase, []).append(rate)

    def _finish(self, state: _State, outcome: TaskResult | Exception) -> Outcome:
        for running in state.running:
            self.cluster.cancel(running.attempt)
        if state in self.waiting:
            self.waiting.remove(state)
        del self.states[id(state.task)]
        return state.task, outcome

    def _lose(self, state: _State, running: _Running, event: Event) -> Outcome | None:
        if running.node:
            state.avoid.add(running.node)
        if event.out_of_memory:
            # The plan states a bound for the task alone; a shared node needs a larger margin.
            state.memory *= 2
        if state.running or state in self.waiting:
            return None
        if state.num_started >= self.policy.max_attempts:
            reason = str(event.error) or "no reason given"
            return self._finish(
                state,
                MmergeError(
                    f"shard {state.task.shard}: {state.num_started} attempts were lost, the last"
                    f" one: {reason}. Run the same command again: finished shards are kept"
                ),
            )
        self.waiting.appendleft(state)
        return None

    def _deadline(self, task: Task) -> float:
        """Return the seconds that an attempt of this task may take."""
        if self.policy.deadline_seconds is not None:
            return self.policy.deadline_seconds
        rates = self.rates.get(task.phase)
        if not rates:
            return (
                self.policy.min_deadline_seconds
                + task.num_bytes / self.policy.slowest_bytes_per_second
            )
        expected = task.num_bytes / statistics.median(rates[-64:])
        return max(self.policy.min_deadline_seconds, self.policy.deadline_factor * expected)

    def _due(self, running: _Running) -> float | None:
        """Return when an attempt becomes overdue; None while it waits for an occupied core."""
        if running.is_overdue:
            return None
        if running.started is not None:
            return running.started + self._deadline(running.attempt.task)
        is_stuck = self.last_start > running.submitted or self._num_at_work() < self._num_slots()
        return running.submitted + self._deadline(running.attempt.task) if is_stuck else None

    def _num_at_work(self) -> int:
        return sum(
            running.started is not None
            for state in self.states.values()
            for running in state.running
        )

    def _seconds_to_next_deadline(self) -> float | None:
        attempts = [running for state in self.states.values() for running in state.running]
        due_times = [time for time in map(self._due, attempts) if time is not None]
        return max(0.0, min(due_times) - self.cluster.now()) if due_times else None

    def _check_deadlines(self) -> Iterator[Outcome]:
        """Start another attempt for each task whose attempts are all overdue.

        Overdue attempts keep running: their nodes may be slow or unreachable and still finish.
        """
        for state in list(self.states.values()):
            self._mark_overdue(state)
            all_overdue = all(running.is_overdue for running in state.running)
            if not state.running or not all_overdue or state in self.waiting:
                continue
            if state.num_started >= self.policy.max_attempts:
                seconds = self._deadline(state.task)
                yield self._finish(
                    state,
                    MmergeError(
                        f"shard {state.task.shard}: {state.num_started} attempts took longer than"
                        f" the deadline of {seconds:.0f} s each. Raise it with --task-deadline, or"
                        " check for a node or store that hangs"
                    ),
                )
            else:
                self.waiting.appendleft(state)

    def _mark_overdue(self, state: _State) -> None:
        now = self.cluster.now()
        for running in list(state.running):
            due = self._due(running)
            if due is None or due > now:
                continue
            if running.started is None:
                self._restart(state, running)
                continue
            running.is_overdue = True
            if running.node:
                state.avoid.add(running.node)
                self.silent.add(running.node)

    def _restart(self, state: _State, running: _Running) -> None:
        """Submit a task again whose attempt was sent to an unreachable node and never started.

        The attempt does not count towards the limit.
        """
        self.cluster.cancel(running.attempt)
        state.running.remove(running)
        state.num_started -= 1
        if state not in self.waiting:
            self.waiting.appendleft(state)


def _place_of(task: Task) -> str:
    """Return the name under which the inputs of a task are cached on a node.

    The copy and the merge of a layer read the same base tensors and share a name.
    """
    return task.shard.removeprefix("base/")
