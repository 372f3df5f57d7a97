"""Runs tasks on a Ray cluster: the one module that hands tasks to Ray."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from typing_extensions import override

from mmerge.manifests.errors import AlreadyExists, MmergeError, NotFound, StoreError, first_line
from mmerge.pipeline.execution.cluster import Attempt, Event, Resources
from mmerge.pipeline.execution.executor import Executor, ExecutorOptions
from mmerge.pipeline.execution.scheduler import (
    Follow,
    Outcomes,
    Policy,
    dispatch,
    nothing_follows,
)
from mmerge.pipeline.planning.memory_bounds import PROCESS_BYTES
from mmerge.workers.runtime.cores import num_cores
from mmerge.workers.task import Task

NODES_SECONDS = 2.0
"""Age at which the list of nodes is read again: nodes join and leave during a build."""
ANSWER_SECONDS = 60.0
"""Limit for reading a task's small result: its node may be cut off in between."""


class RayExecutor(Executor):
    """Runs tasks on a Ray cluster: the one at `address`, or a local one that it starts and ends."""

    def __init__(
        self,
        *,
        address: str | None = None,
        num_workers: int | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.num_workers = num_workers
        self.policy = policy or Policy()
        self._started = False
        self._variables: list[str] = []
        self._nodes: dict[str, str] = {}

    @override
    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        if not tasks:
            return
        if store_uri.startswith("memory://"):
            raise StoreError(
                f"{store_uri}: other processes cannot see it. Use --executor serial, or another"
                " 'output'"
            )
        self.connect()
        self._check_memory(tasks)
        yield from dispatch(
            tasks, RayCluster(store_uri), policy=self.policy, nodes=self._nodes, follow=follow
        )

    def connect(self) -> None:
        """Connect this process to the cluster, unless it is connected already.

        Raises:
            MmergeError: the cluster cannot be reached.
        """
        if self._started:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not self.address:
            self._variables += _close_to_others()
        import ray

        if not ray.is_initialized():
            is_main = threading.current_thread() is threading.main_thread()
            handler = signal.getsignal(signal.SIGTERM) if is_main else None
            try:
                if self.address:
                    ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False)
                else:
                    # "local": without it Ray would join whatever cluster was last started on this
                    # machine.
                    ray.init(
                        address="local",
                        num_cpus=self.num_workers,
                        include_dashboard=False,
                        logging_level=logging.ERROR,
                        log_to_driver=False,
                    )
            except Exception as error:  # of a node that starts too slowly, Ray raises a bare one
                raise _describe_failure(self.address, error) from error
            if handler is not None:
                # Ray puts one of its own there, which would skip our clean end.
                signal.signal(signal.SIGTERM, handler)
            self._started = True

    def _check_memory(self, tasks: Sequence[Task]) -> None:
        import ray

        largest = max(tasks, key=lambda task: task.peak_bytes)
        available = max(
            (node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0
        )
        if largest.peak_bytes > available:
            raise MmergeError(
                f"shard {largest.shard} needs {largest.peak_bytes / 1e9:.1f} GB, the largest node"
                f" offers {available / 1e9:.1f} GB. Use larger nodes, or a smaller --block-entries"
            )

    @override
    def close(self) -> None:
        if self._started:
            import ray

            ray.shutdown()
            self._started = False
        _forget_token(self._variables)
        self._variables = []


def _describe_failure(address: str | None, error: Exception) -> MmergeError:
    """Return the error of a cluster that cannot be reached, or of a local Ray that fails."""
    problem, remedy = "a local Ray did not start", "Run again when this machine is less busy"
    if address:
        problem, remedy = f"{address}: cannot be reached", "Check --address"
    return MmergeError(
        f"{problem} ({first_line(error)}). {remedy}, or run with --executor processes"
    )


def _close_to_others() -> list[str]:
    """Let a local Ray listen on loopback alone and demand a token, new unless the user sets one;
    return the names of the environment variables that were set for it.

    Ray executes whatever code it receives, so neither other machines nor other users of this one
    may reach it. The token is passed on in the environment, where only this user can read it.
    """
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return []
    # Ray has no other switch for loopback: an address of loopback given to `ray.init` is replaced
    # by that of the network. The variable is read when Ray is imported.
    variables = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        variables["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    missing = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in missing})
    _read_token_again()
    return missing


def _forget_token(variables: list[str]) -> None:
    """Unset variables of a local Ray: this process may connect to another cluster later."""
    for name in variables:
        os.environ.pop(name, None)
    if variables:
        _read_token_again()


def _read_token_again() -> None:
    """Let Ray read mode and token from the environment: it does so once, when it is imported."""
    ray = sys.modules.get("ray")
    if ray is not None:
        ray._raylet.Config.initialize("")
        with suppress(AttributeError):  # before Ray 2.52
            ray._raylet.AuthenticationTokenLoader.instance().reset_cache()


class RayCluster:
    """The nodes of the Ray cluster that this process is connected to, for `dispatch`."""

    def __init__(self, store_uri: str) -> None:
        self.store_uri = store_uri
        self._attempts: dict[Any, Attempt] = {}
        self._places: dict[Any, str] = {}
        self._nodes: list[dict[str, Any]] = []
        self._counted = -math.inf
        self._gone: set[str] = set()
        self._num_undelivered = 0

    def now(self) -> float:
        """Return seconds of a monotonic clock."""
        return time.monotonic()

    def num_slots(self, resources: Resources) -> int:
        """Return how many attempts of this size the nodes alive can run at once."""
        requirements = {
            "CPU": resources.num_cpus,
            "GPU": resources.num_gpus,
            "memory": float(resources.memory),
        }
        return sum(
            int(
                min(
                    node["Resources"].get(name, 0) // amount
                    for name, amount in requirements.items()
                    if amount
                )
            )
            for node in self._alive_nodes()
        )

    def start(self, attempt: Attempt) -> None:
        """Submit an attempt to Ray on a suitable node.

        A new attempt avoids the nodes of earlier ones where others fit it. A first attempt prefers
        the node with warm caches; otherwise Ray spreads tasks over the nodes.
        """
        from mmerge.workers.tasks.ray_remote import run_task_remote

        resources = attempt.resources
        options: dict[str, Any] = {
            "num_cpus": resources.num_cpus,
            "num_gpus": resources.num_gpus,
            "memory": self._to_shape(resources.memory),
            "scheduling_strategy": "SPREAD",
            "name": f"{attempt.task.shard} (attempt {attempt.number})",
        }
        others = [
            node["NodeID"]
            for node in self._alive_nodes()
            if node["NodeID"] not in attempt.avoid and _fits(node, resources)
        ]
        if attempt.avoid and others:
            options["label_selector"] = {
                "ray.io/node-id": f"!in({','.join(sorted(attempt.avoid))})"
            }
        elif attempt.prefer in others:
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            # Soft, and elsewhere while that node is busy: a warm cache is worth less than a free
            # core.
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(
                attempt.prefer, soft=True, _spill_on_unavailable=True
            )
        self._attempts[run_task_remote.options(**options).remote(attempt.task, self.store_uri)] = (
            attempt
        )

    def wait(self, timeout: float | None) -> list[Event]:
        """Return the events since the last call, at least one unless `timeout` seconds pass."""
        import ray

        if not self._attempts:
            time.sleep(timeout or 0)
            return []
        end = None if timeout is None else self.now() + timeout
        while True:
            left = NODES_SECONDS if end is None else min(NODES_SECONDS, max(0.0, end - self.now()))
            ready, _ = ray.wait(
                list(self._attempts), num_returns=1, timeout=left, fetch_local=False
            )
            events = [self._read(stream) for stream in ready] + self._lose_dead_nodes()
            if events or (end is not None and self.now() >= end):
                return events

    def cancel(self, attempt: Attempt) -> None:
        """End an attempt and its process; an unreachable node does so once it is reconnected."""
        streams = [stream for stream, started in self._attempts.items() if started is attempt]
        for stream in streams:
            self._num_undelivered += stream not in self._places
            self._drop(stream)

    def _drop(self, stream: Any) -> Attempt:
        import ray

        self._places.pop(stream, None)
        with suppress(Exception):
            ray.cancel(stream, force=True)
        return self._attempts.pop(stream)

    def _lose_dead_nodes(self) -> list[Event]:
        """Return events for the attempts on dead nodes and for those that may be undelivered.

        Ray does not report them soon: after the death of a raylet it waits for the raylet's
        workers, which may hang; for a task sent to an unreachable node it waits until the
        connection breaks, which takes minutes.
        """
        alive = {node["NodeID"] for node in self._alive_nodes()}
        lost = [(stream, node) for stream, node in self._places.items() if node not in alive]
        events = [
            Event(self._drop(stream), "lost", node, error=MmergeError(f"node {node[:12]} is gone"))
            for stream, node in lost
        ]
        if self._gone:
            self._gone.clear()
            self._num_undelivered += 1
            events += [
                Event(attempt, "undelivered")
                for stream, attempt in self._attempts.items()
                if stream not in self._places
            ]
        return events

    def _alive_nodes(self) -> list[dict[str, Any]]:
        import ray

        if self.now() - self._counted > NODES_SECONDS:
            before = {node["NodeID"] for node in self._nodes}
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
            self._gone |= before - {node["NodeID"] for node in self._nodes}
            self._counted = self.now()
        return self._nodes

    def _to_shape(self, memory: int) -> int:
        """Return the memory to request, at most that of the largest node.

        An attempt that requests more than any node has would wait forever.

        Ray leases workers per resource shape, not per task. If a lease request went to an
        unreachable node, new tasks of the same shape would wait for it as well. One byte less per
        undelivered attempt makes a new shape.
        """
        largest = max(
            (node["Resources"].get("memory", memory) for node in self._alive_nodes()),
            default=memory,
        )
        return max(int(min(memory, largest)) - self._num_undelivered, 0)

    def _read(self, stream: Any) -> Event:
        """Return the next event of an attempt's stream: its node, then its result or its end."""
        import ray

        try:
            value = ray.get(next(stream), timeout=ANSWER_SECONDS)
        except StopIteration:
            event = Event(
                self._attempts[stream], "lost", error=MmergeError("it ended without a result")
            )
        except Exception as error:  # noqa: BLE001
            # Only errors of Ray and of the task arrive here.
            event = _to_event(self._attempts[stream], error, ray.exceptions)
        else:
            if isinstance(value, str):
                self._places[stream] = value
                return Event(self._attempts[stream], "started", node=value)
            event = Event(self._attempts[stream], "finished", result=value)
        del self._attempts[stream]
        self._places.pop(stream, None)
        return event


def _fits(node: dict[str, Any], resources: Resources) -> bool:
    offered = node["Resources"]
    return bool(
        offered.get("CPU", 0) >= resources.num_cpus and offered.get("GPU", 0) >= resources.num_gpus
    )


def _to_event(attempt: Attempt, error: Exception, exceptions: Any) -> Event:
    """Return the event for an error: `failed` for the task's own fault, otherwise `lost`."""
    if isinstance(error, exceptions.OutOfMemoryError):
        return Event(attempt, "lost", error=MmergeError(first_line(error)), out_of_memory=True)
    if isinstance(error, exceptions.RayTaskError):
        cause = error.cause
        if (
            isinstance(cause, StoreError)
            and not isinstance(cause, (NotFound, AlreadyExists))
            and attempt.number == 1
        ):
            return Event(attempt, "lost", error=cause)
        if isinstance(cause, MmergeError):
            return Event(attempt, "failed", error=cause)
        return Event(
            attempt,
            "failed",
            error=MmergeError(f"shard {attempt.task.shard}: {type(cause).__name__}: {cause}"),
        )
    if isinstance(error, exceptions.RayError):
        return Event(attempt, "lost", error=MmergeError(first_line(error)))
    return Event(attempt, "failed", error=error)


def open_ray(options: ExecutorOptions) -> RayExecutor:
    """Return an executor on a Ray cluster; a memory limit bounds the number of local workers."""
    num_workers = options.num_workers
    if options.memory_bytes is not None:
        worker_bytes = PROCESS_BYTES + options.peak_bytes
        num_workers = min(num_workers or num_cores(), max(options.memory_bytes // worker_bytes, 1))
    return RayExecutor(
        address=options.address,
        num_workers=num_workers,
        policy=Policy(deadline_seconds=options.deadline_seconds),
    )
