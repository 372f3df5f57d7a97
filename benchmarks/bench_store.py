"""Measure throughput to and from a real S3 server, beside the library alone.

Usage: python benchmarks/bench_store.py [--mib 512] [--server ceph|moto|URI].

With `ceph` (the default) a Ceph object gateway on this machine is started and stopped (Debian:
radosgw, ceph-mon, ceph-osd, ceph-common). A URI measures the store that it names, with credentials
from the environment. Both sides use the same client and take turns, in another order each round;
speeds are medians of the rounds, ratios the median of the ratios of one round. Ours also computes
and checks BLAKE3 digests. CPU seconds are those of this process alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import obstore
from blake3 import blake3

from mmerge.manifests.stores.object_store import ObjectStore

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from ceph_server import ceph_server
from store_servers import moto_server

PIECE_BYTES = 16 << 20


@contextmanager
def open_place(server: str) -> Iterator[str]:
    """Yield a URI to write to."""
    if "://" in server:
        yield server
        return
    with tempfile.TemporaryDirectory(prefix="mmerge-bench-") as folder:
        start = (
            ceph_server(Path(folder), kind="bluestore")
            if server == "ceph"
            else moto_server(Path(folder))
        )
        with start as environment:
            os.environ.update(environment)
            yield "s3://bucket/bench"


def write_alone(store: ObjectStore, data: memoryview) -> None:
    """The library's multipart put, with its own defaults (5 MiB parts, 12 at once)."""
    obstore.put(store.client, "alone", data)


def write_ours(store: ObjectStore, data: memoryview) -> None:
    """The streaming writer as a task uses it."""
    with store.open_writer("ours") as out:
        for start in range(0, len(data), PIECE_BYTES):
            out.write(data[start : start + PIECE_BYTES])


def read_alone(store: ObjectStore, data: memoryview) -> None:
    """The library's get of the whole object, as one stream."""
    content = obstore.get(store.client, "alone").bytes()
    assert len(content) == len(data)


def read_alone_tensors(store: ObjectStore, data: memoryview) -> None:
    """The library's get_range of 64 MiB, one after the other, as a loader reads tensors."""
    for start in range(0, len(data), 64 << 20):
        content = obstore.get_range(
            store.client, "alone", start=start, length=min(64 << 20, len(data) - start)
        )
        assert len(content) == min(64 << 20, len(data) - start)


def read_ours(store: ObjectStore, data: memoryview) -> None:
    """Ranges of 64 MiB, as a loader reads tensors, with their digest."""
    digest = blake3()
    for start in range(0, len(data), 64 << 20):
        store.read_range(
            "ours", offset=start, num_bytes=min(64 << 20, len(data) - start), on_part=digest.update
        )
    assert digest.hexdigest() == wanted(data)


def read_forward(store: ObjectStore, data: memoryview) -> None:
    """Blocks of 512 KiB one after the other, as a merge reads its inputs."""
    digest = blake3()
    for start in range(0, len(data), 512 << 10):
        size = min(512 << 10, len(data) - start)
        digest.update(
            store.read_forward("ours", offset=start, num_bytes=size, start=0, stop=len(data))
        )
    assert digest.hexdigest() == wanted(data)


_wanted: dict[int, str] = {}


def wanted(data: memoryview) -> str:
    """Return the digest that `data` has."""
    return _wanted.setdefault(id(data), blake3(data).hexdigest())


STEPS: dict[str, Callable[[ObjectStore, memoryview], None]] = {
    "write, library alone": write_alone,
    "write, mmerge": write_ours,
    "read, library alone, one stream": read_alone,
    "read, library alone, 64 MiB ranges": read_alone_tensors,
    "read, mmerge, tensors of 64 MiB": read_ours,
    "read, mmerge, forward in blocks": read_forward,
}


PAIRS = {
    "write": ("write, mmerge", "write, library alone"),
    "read, tensors of 64 MiB": (
        "read, mmerge, tensors of 64 MiB",
        "read, library alone, 64 MiB ranges",
    ),
    "read, forward in blocks": (
        "read, mmerge, forward in blocks",
        "read, library alone, one stream",
    ),
}


def measure(
    step: Callable[[ObjectStore, memoryview], None], store: ObjectStore, data: memoryview
) -> tuple[float, float]:
    """Return seconds on the clock and of this process's CPU."""
    began, spent = time.perf_counter(), time.process_time()
    step(store, data)
    return time.perf_counter() - began, time.process_time() - spent


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--server", default="ceph")
    options = parser.parse_args()
    data = memoryview(
        np.random.default_rng(0).integers(0, 256, options.mib << 20, dtype=np.uint8)
    ).cast("B")
    wanted(data)
    with open_place(options.server) as uri:
        store = ObjectStore.open(uri, create=True)
        timings: dict[str, list[tuple[float, float]]] = {name: [] for name in STEPS}
        for write in (
            write_alone,
            write_ours,
        ):  # the first write of each makes connections, and is not counted
            write(store, data)
        for number in range(options.rounds):
            names = list(STEPS)
            for name in names if number % 2 else reversed(names):
                timings[name].append(measure(STEPS[name], store, data))
        for key in ("alone", "ours"):
            store.delete(key)
    for name, times in timings.items():
        rates = [options.mib / seconds for seconds, _ in times]
        cpu = statistics.median(spent for _, spent in times)
        print(
            f"{name:34s} {statistics.median(rates):8.0f} MiB/s  "
            f" ({', '.join(f'{rate:.0f}' for rate in rates)}; {cpu:.2f} s of CPU)"
        )
    for name, (ours, alone) in PAIRS.items():
        ratios = [
            theirs / mine
            for (mine, _), (theirs, _) in zip(timings[ours], timings[alone], strict=True)
        ]
        print(
            f"{name}: {statistics.median(ratios):.0%} of the library alone"
            f" ({', '.join(f'{ratio:.0%}' for ratio in ratios)})"
        )
    print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
