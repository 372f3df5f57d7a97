"""A Ray cluster of several raylets on this host, and faults that its tasks meet as a test has
written them down.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

CPUS_PER_NODE = 2
GIB = 1 << 30


class Faults:
    """What happens to tasks, by shard: each fault once, in whichever worker meets it first. Workers
    note when they begin and end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next test writes its own script for the same workers."""
        for name in ("faults", "events"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir()
        (self.folder / "release").unlink(missing_ok=True)

    def set(self, shard: str, action: str) -> None:
        """`wait` until released, `kill` the worker, `eat` memory until somebody ends it; `slow`
        takes a second.
        """
        (self.folder / "faults" / f"{shard.replace('/', '_')}@{action}").write_text("")

    def await_end_of(self, begun: dict[str, Any], *, seconds: float = 30) -> None:
        """Wait until the attempt that began so has ended by itself."""
        until(
            lambda: [
                event
                for event in self.events(kind="end", shard=begun["shard"])
                if event["pid"] == begun["pid"]
            ],
            seconds=seconds,
        )

    def await_end_of_workers(self, *others: int, seconds: float = 30) -> None:
        """Wait until no process that ever began a task of this script is left, nor any of the
        others.
        """
        until(
            lambda: not any(map(is_alive, (*others, *(event["pid"] for event in self.events())))),
            seconds=seconds,
        )

    def release(self) -> None:
        (self.folder / "release").write_text("")

    def events(self, *, kind: str = "begin", shard: str | None = None) -> list[dict[str, Any]]:
        found = [
            json.loads(path.read_text()) for path in sorted((self.folder / "events").glob("*.json"))
        ]
        return [
            event for event in found if event["kind"] == kind and shard in (None, event["shard"])
        ]

    def await_event(
        self, *, kind: str = "begin", shard: str, seconds: float = 60
    ) -> dict[str, Any]:
        return until(lambda: self.events(kind=kind, shard=shard), seconds=seconds)[0]

    def make_hook(self) -> Callable[[], None]:
        """What a worker does when it starts; a closure, so that it travels by value."""
        folder = str(self.folder)

        def install() -> None:
            import json
            import os
            import signal
            import time
            import uuid
            from pathlib import Path

            import ray

            import mmerge.workers.tasks.run as module

            root, original = Path(folder), module.run_task

            def note(kind: str, shard: str) -> None:
                node, address = (
                    ray.get_runtime_context().get_node_id(),
                    ray.util.get_node_ip_address(),
                )
                event = {
                    "kind": kind,
                    "shard": shard,
                    "pid": os.getpid(),
                    "node": node,
                    "address": address,
                    "time": time.time(),
                }
                path = root / "events" / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}"
                path.write_text(json.dumps(event))
                path.rename(path.with_suffix(".json"))

            def claim(shard: str, action: str) -> bool:
                path = root / "faults" / f"{shard.replace('/', '_')}@{action}"
                try:
                    path.rename(path.with_suffix(".met"))
                except FileNotFoundError:
                    return False
                return True

            def run_task(task, store_uri):  # type: ignore[no-untyped-def]
                note("begin", task.shard)
                if claim(task.shard, "kill"):
                    os.kill(os.getpid(), signal.SIGKILL)
                if claim(task.shard, "eat"):
                    hoard = []
                    while True:
                        hoard.append(b"x" * (64 << 20))
                        time.sleep(0.02)
                if claim(task.shard, "slow") or (root / "faults" / "all@slow").exists():
                    time.sleep(1)
                if claim(task.shard, "wait"):
                    while not (root / "release").exists():
                        time.sleep(0.05)
                result = original(task, store_uri)
                note("end", task.shard)
                return result

            module.run_task = run_task

        return install


def until(condition: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Wait for what `condition` returns to be true, and return it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail(f"not within {seconds} s")


def children_of(pid: int) -> list[int]:
    """All descendants of a process, from /proc."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (OSError, ProcessLookupError):
            continue
        parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def end_all(pids: list[int]) -> None:
    """End processes that this test started, by their ids."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


DRIVER = """
import cloudpickle, ray, sys
hook = cloudpickle.loads(bytes.fromhex(sys.argv[1]))
ray.init(address=sys.argv[2], runtime_env={"worker_process_setup_hook": hook}, log_to_driver=False)
from mmerge.pipeline.cli.main import main
main(sys.argv[3:])
"""


@pytest.fixture
def drive(lab: Any, faults: Faults) -> Callable[..., subprocess.Popen[str]]:
    """Starts another driver: `mmerge run` in a process of its own, its workers with the test's
    faults.
    """
    import cloudpickle

    def start(
        address: str,
        raw: dict[str, Any],
        *,
        output: str = "store",
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        recipe = lab.write_recipe(raw | {"output": output}, f"{output}.yaml")
        hook = cloudpickle.dumps(faults.make_hook()).hex()
        command = [
            *prefix,
            sys.executable,
            "-c",
            DRIVER,
            hook,
            address,
            "run",
            str(recipe),
            "--address",
            address,
            *options,
        ]
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    return start


def read_digests(folder: Path) -> dict[str, str]:
    """Every object, file, manifest and table of a store."""
    found = [
        path
        for part in ("objects", "files", "builds")
        for path in (folder / part).rglob("*")
        if path.is_file()
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


@pytest.fixture
def digests() -> Callable[[Path], dict[str, str]]:
    return read_digests


@pytest.fixture
def undisturbed(lab: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """A recipe, and the bytes that a serial run makes of it."""
    from mmerge.pipeline import make_plan, read_recipe, run

    lab.config |= {"num_hidden_layers": 6}
    raw: dict[str, Any] = lab.make_all()
    run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "serial"}))))
    return raw, read_digests(lab.folder / "serial")


class RayNodes:
    """A head without cores and nodes with two logical cores each, all raylets on this host."""

    def __init__(
        self,
        *,
        num_nodes: int,
        dashboard: bool = False,
        system_config: dict[str, Any] | None = None,
    ) -> None:
        from ray.cluster_utils import Cluster

        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        # A job's entrypoint calls `python`: the one of these tests, as in an image.
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        fast = {
            "health_check_period_ms": 1000,
            "health_check_failure_threshold": 3,
            "health_check_timeout_ms": 1000,
        }
        if dashboard:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.dashboard = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._orphans: list[int] = []
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": dashboard,
                **({"dashboard_port": int(self.dashboard.rpartition(":")[2])} if dashboard else {}),
                "memory": GIB,
                "object_store_memory": 100 << 20,
                "_system_config": fast | (system_config or {}),
            },
        )
        self.nodes = [self.add() for _ in range(num_nodes)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        return self.cluster.add_node(
            num_cpus=CPUS_PER_NODE, memory=4 * GIB, object_store_memory=100 << 20
        )

    def find(self, node_id: str) -> Any:
        return next(node for node in self.nodes if node.node_id == node_id)

    def kill_raylet(self, node: Any) -> None:
        """SIGKILL one raylet: its agents survive, its workers find out by themselves."""
        raylet = node.all_processes["raylet"][0].process.pid
        self._orphans += children_of(raylet)
        os.kill(raylet, signal.SIGKILL)
        self.nodes.remove(node)

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()
        end_all(self._orphans)


@pytest.fixture
def make_ray_nodes() -> Iterator[Callable[..., RayNodes]]:
    """Clusters of a test's own."""
    made: list[RayNodes] = []

    def make(*, num_nodes: int, system_config: dict[str, Any]) -> RayNodes:
        made.append(RayNodes(num_nodes=num_nodes, system_config=system_config))
        return made[-1]

    yield make
    for nodes in made:
        nodes.close()


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tmp_path_factory.mktemp("script"))


@pytest.fixture
def faults(script: Faults) -> Faults:
    script.reset()
    return script


@pytest.fixture(scope="module")
def ray_nodes(request: pytest.FixtureRequest) -> Iterator[RayNodes]:
    nodes = RayNodes(num_nodes=getattr(request.module, "NUM_NODES", 3), dashboard=True)
    yield nodes
    nodes.close()
