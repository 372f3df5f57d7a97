"""A Ray that `mmerge run` starts: reached from this machine alone, by who has its token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

DRIVER = """
import json, os, sys
if sys.argv[1] == "ray first":
    import ray
from mmerge.pipeline.execution.ray_executor import RayExecutor
executor = RayExecutor(num_workers=1)
executor.connect()
import ray
print(json.dumps({
    "answer": ray.get(ray.remote(lambda: 7).remote()),
    "address": ray.get_runtime_context().gcs_address,
    "token": os.environ["RAY_AUTH_TOKEN"],
}), flush=True)
sys.stdin.read()
executor.close()
# Another cluster, without a token, may be the next.
assert ray._raylet.get_authentication_mode() == 0
assert not [name for name in os.environ if name.startswith("RAY_AUTH")]
"""
CLIENT = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1])
print("connected")
"""


def make_environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "PYTHONPATH"
    }
    return kept | {"RAY_USAGE_STATS_ENABLED": "0"} | variables


@contextmanager
def local_ray(order: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the id of a process with a local Ray, and its address and token."""
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, order],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=make_environment(),
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        line = driver.stdout.readline()
        assert line, "the driver ended"
        yield driver.pid, json.loads(line)
    finally:
        driver.stdin.close()
        driver.stdout.close()
        driver.wait(timeout=60)
    assert driver.returncode == 0


def find_tree(root: int) -> set[int]:
    """Return the ids of a process and of all that it started, in any number of steps."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    tree = {root}
    while True:
        children = {process for process, parent in parents.items() if parent in tree}
        if children <= tree:
            return tree
        tree |= children


def find_listeners(processes: set[int]) -> list[IPv4Address | IPv6Address]:
    """Return the addresses at which processes accept TCP connections."""
    sockets = set()
    for process in processes:
        for descriptor in Path(f"/proc/{process}/fd").glob("*"):
            with suppress(OSError):
                sockets.add(os.readlink(descriptor))  # noqa: PTH115 - "socket:[123]" is no path
    addresses = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:  # listening
                words = bytes.fromhex(fields[1].partition(":")[0])
                # Words of 32 bits in the order of this machine.
                groups = [words[start : start + 4][::-1] for start in range(0, len(words), 4)]
                addresses.append(ip_address(b"".join(groups)))
    return addresses


def is_loopback(address: IPv4Address | IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def start_client(address: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=make_environment(**variables),
    )


@pytest.mark.ray
def test_a_local_ray_listens_on_loopback_and_refuses_clients_without_its_token() -> None:
    with local_ray("mmerge first") as (driver, facts):
        assert facts["answer"] == 7
        processes = find_tree(driver)
        listeners = find_listeners(processes)
        assert len(listeners) > 3
        assert all(is_loopback(listener) for listener in listeners), listeners
        for process in processes:
            with suppress(OSError):  # an idle worker may have ended
                assert facts["token"] not in Path(f"/proc/{process}/cmdline").read_text()
        clients = [
            start_client(facts["address"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=facts["token"]),
            start_client(facts["address"], RAY_AUTH_MODE="disabled"),
            start_client(facts["address"], RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0" * 64),
        ]
        answers = [client.communicate(timeout=60) for client in clients]
    assert "connected" in answers[0][0], answers[0]
    for out, err in answers[1:]:
        assert "connected" not in out
        assert "AuthenticationError" in err


@pytest.mark.ray
def test_a_process_that_imported_ray_before_demands_the_token_too() -> None:
    with local_ray("ray first") as (_, facts):
        assert facts["answer"] == 7
        _, err = start_client(facts["address"], RAY_AUTH_MODE="disabled").communicate(timeout=60)
    assert "AuthenticationError" in err


@pytest.mark.ray
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (None, "a local Ray did not start (The current node timed out"),
        ("head:6379", "head:6379: cannot be reached (The current node timed out"),
    ],
)
def test_a_ray_that_does_not_start_is_explained(
    monkeypatch: pytest.MonkeyPatch, address: str | None, message: str
) -> None:
    """Ray raises a bare Exception where its processes were suspended, say, while they started."""
    import ray

    from mmerge.manifests.errors import MmergeError
    from mmerge.pipeline.execution.ray_executor import RayExecutor

    def fail(**options: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    executor = RayExecutor(address=address)
    with pytest.raises(MmergeError) as caught:
        executor.connect()
    executor.close()
    assert message in str(caught.value)
