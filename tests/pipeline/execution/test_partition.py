"""Nodes with addresses of their own, one cut off in mid-task: the build ends right, and what the
lost node writes later is harmless.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

DEADLINE = 20


def ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=check, timeout=20
    )


def can_make_namespaces() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"mm-probe-{os.getpid()}"
    made = ip("netns", "add", name, check=False).returncode == 0
    linked = (
        made
        and ip(
            "-n", name, "link", "add", "x0", "type", "veth", "peer", "name", "x1", check=False
        ).returncode
        == 0
    )
    if made:
        ip("netns", "delete", name, check=False)
    return linked


pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(
        not can_make_namespaces(), reason="needs root, iproute2 and network namespaces"
    ),
]


class Network:
    """A head and two nodes, 10.77.0.1 to 3, each in a network namespace; the bridge is in the
    head's.
    """

    def __init__(self) -> None:
        self.spaces = [f"mm-{os.getpid()}-{number}" for number in (1, 2, 3)]
        self.processes: list[subprocess.Popen[bytes]] = []
        for space in self.spaces:
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
        head = self.spaces[0]
        ip("-n", head, "link", "add", "br0", "type", "bridge")
        ip("-n", head, "addr", "add", "10.77.0.1/24", "dev", "br0")
        ip("-n", head, "link", "set", "br0", "up")
        for number, space in enumerate(self.spaces[1:], 2):
            ip(
                "-n",
                head,
                "link",
                "add",
                f"v{number}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                space,
            )
            ip("-n", head, "link", "set", f"v{number}", "master", "br0", "up")
            ip("-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")

    def enter(self, number: int) -> list[str]:
        return ["ip", "netns", "exec", self.spaces[number - 1]]

    def start(self, number: int, temporary: str) -> None:
        where = (
            [
                "--head",
                "--port=6379",
                "--num-cpus=0",
                "--include-dashboard=false",
                f"--temp-dir={temporary}",
            ]
            if number == 1
            else ["--address=10.77.0.1:6379", "--num-cpus=2"]
        )
        common = [
            f"--node-ip-address=10.77.0.{number}",
            "--memory=4000000000",
            "--object-store-memory=100000000",
            "--block",
        ]
        command = [
            *self.enter(number),
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            *where,
            *common,
        ]
        environment = os.environ | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
            "RAY_health_check_timeout_ms": "1000",
        }
        self.processes.append(
            subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
            )
        )

    def set_link(self, number: int, state: str) -> None:
        ip("-n", self.spaces[number - 1], "link", "set", "eth0", state)

    def close(self) -> None:
        """End what lives in the namespaces, by process id, and delete them."""
        for space in self.spaces:
            for pid in ip("netns", "pids", space, check=False).stdout.split():
                try:
                    os.kill(int(pid), 9)
                except ProcessLookupError:
                    continue
            ip("netns", "delete", space, check=False)
        for process in self.processes:
            process.wait()


@pytest.fixture
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    import tempfile

    found = Network()
    temporary = tempfile.mkdtemp(prefix="mm-ray-", dir="/tmp")  # short: sockets lie below it
    try:
        for number in (1, 2, 3):
            found.start(number, temporary)
            # One after the other: they share a folder, in which two that start at once choose the
            # same names.
            wait_for_nodes(found, number)
        yield found
    finally:
        found.close()
        shutil.rmtree(temporary, ignore_errors=True)


COUNT = """
import sys, time
from ray._raylet import GcsClient
client = GcsClient(address="10.77.0.1:6379")
while sum(node.state == 0 for node in client.get_all_node_info().values()) < int(sys.argv[1]):
    time.sleep(0.1)
"""


def wait_for_nodes(network: Network, number: int) -> None:
    """Wait until so many nodes are alive, the head's included."""
    end = time.monotonic() + 60
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    probe = [*network.enter(1), sys.executable, "-c", COUNT, str(number)]
    while subprocess.run(
        probe, capture_output=True, check=False, env=environment, timeout=60
    ).returncode:
        assert time.monotonic() < end, f"node {number} does not come up"
        time.sleep(0.2)


def test_a_node_cut_off_in_mid_task_costs_at_most_the_deadline_and_its_late_write_changes_nothing(
    network: Network,
    lab: Any,
    undisturbed: tuple[Any, dict[str, str]],
    faults: Any,
    drive: Any,
    digests: Any,
) -> None:
    raw, expected = undisturbed
    faults.set("layers.1", "wait")
    process = drive(
        "10.77.0.1:6379", raw, options=["--task-deadline", str(DEADLINE)], prefix=network.enter(1)
    )
    try:
        held = faults.await_event(shard="layers.1", seconds=120)
        number = int(held["address"].rpartition(".")[2])
        network.set_link(number, "down")
        cut = time.time()
        try:
            output, _ = process.communicate(timeout=DEADLINE * 2 + 20)
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"the build hangs: {(error.output or b'')[-3000:].decode()}")
        took = time.time() - cut
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert digests(lab.folder / "store") == expected
    second = faults.events(shard="layers.1")[1]
    assert second["address"] != held["address"]
    assert second["time"] - cut <= DEADLINE + 5
    print(  # noqa: T201
        f"cut off at 0 s: second attempt after {second['time'] - cut:.1f} s, build ended after"
        f" {took:.1f} s"
    )
    # The lost node is still alive on its side, and ends its old attempt now: same names, same
    # bytes.
    faults.release()
    faults.await_end_of(held)
    assert digests(lab.folder / "store") == expected
    network.set_link(number, "up")
    time.sleep(3)
    assert digests(lab.folder / "store") == expected
