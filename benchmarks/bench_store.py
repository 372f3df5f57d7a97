"""Throughput to a real S3 server and back, ours beside the library alone: python benchmarks/bench_store.py [--mib 512] [--server ceph|moto|URI].

With `ceph` (the default) a Ceph object gateway on this machine is started and stopped (Debian: radosgw, ceph-mon, ceph-osd,
ceph-common). A URI measures the store that it names, with credentials from the environment. Both sides use the same client,
take turns, and the median of the rounds counts. Ours also computes and checks BLAKE3 digests.
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

from mmerge.manifests.store import Store, open_store

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from store_servers import ceph_server, moto_server

PIECE_BYTES = 16 << 20


@contextmanager
def open_place(server: str) -> Iterator[str]:
    """Yield a URI to write to."""
    if "://" in server:
        yield server
        return
    with tempfile.TemporaryDirectory(prefix="mmerge-bench-") as folder:
        start = ceph_server(Path(folder), kind="bluestore") if server == "ceph" else moto_server(Path(folder))
        with start as environment:
            os.environ.update(environment)
            yield "s3://bucket/bench"


def write_alone(store: Store, data: memoryview) -> None:
    """The library's multipart put, with its own defaults (5 MiB parts, 12 at once)."""
    obstore.put(store._inner, "alone", data)


def write_ours(store: Store, data: memoryview) -> None:
    """The streaming writer as a task uses it."""
    with store.open_writer("ours") as out:
        for start in range(0, len(data), PIECE_BYTES):
            out.write(data[start : start + PIECE_BYTES])


def read_alone(store: Store, data: memoryview) -> None:
    """The library's get of the whole object, as one stream."""
    found = obstore.get(store._inner, "alone").bytes()
    assert len(found) == len(data)


def read_alone_tensors(store: Store, data: memoryview) -> None:
    """The library's get_range of 64 MiB, one after the other, as a loader reads tensors."""
    for start in range(0, len(data), 64 << 20):
        found = obstore.get_range(store._inner, "alone", start=start, length=min(64 << 20, len(data) - start))
        assert len(found) == min(64 << 20, len(data) - start)


def read_ours(store: Store, data: memoryview) -> None:
    """Ranges of 64 MiB, as a loader reads tensors, with their digest."""
    digest = blake3()
    for start in range(0, len(data), 64 << 20):
        digest.update(store.read_range("ours", offset=start, num_bytes=min(64 << 20, len(data) - start)))
    assert digest.hexdigest() == wanted(data)


def read_forward(store: Store, data: memoryview) -> None:
    """Blocks of 512 KiB one after the other, as a merge reads its inputs."""
    digest = blake3()
    for start in range(0, len(data), 512 << 10):
        size = min(512 << 10, len(data) - start)
        digest.update(store.read_forward("ours", offset=start, num_bytes=size, start=0, stop=len(data)))
    assert digest.hexdigest() == wanted(data)


_wanted: dict[int, str] = {}


def wanted(data: memoryview) -> str:
    """Return the digest that `data` has."""
    return _wanted.setdefault(id(data), blake3(data).hexdigest())


STEPS: dict[str, Callable[[Store, memoryview], None]] = {
    "write, library alone": write_alone,
    "write, mmerge": write_ours,
    "read, library alone, one stream": read_alone,
    "read, library alone, 64 MiB ranges": read_alone_tensors,
    "read, mmerge, tensors of 64 MiB": read_ours,
    "read, mmerge, forward in blocks": read_forward,
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--server", default="ceph")
    options = parser.parse_args()
    data = memoryview(np.random.default_rng(0).integers(0, 256, options.mib << 20, dtype=np.uint8)).cast("B")
    wanted(data)
    with open_place(options.server) as uri:
        store = open_store(uri)
        seconds: dict[str, list[float]] = {name: [] for name in STEPS}
        for _ in range(options.rounds):
            for name, step in STEPS.items():
                began = time.perf_counter()
                step(store, data)
                seconds[name].append(time.perf_counter() - began)
        for key in ("alone", "ours"):
            store.delete(key)
    speed = {name: options.mib / statistics.median(found) for name, found in seconds.items()}
    for name, found in speed.items():
        print(f"{name:34s} {found:8.0f} MiB/s   ({', '.join(f'{options.mib / one:.0f}' for one in seconds[name])})")
    print(f"write: {speed['write, mmerge'] / speed['write, library alone']:.0%} of the library alone")
    alone, tensors = speed["read, library alone, one stream"], speed["read, library alone, 64 MiB ranges"]
    print(f"read, tensors: {speed['read, mmerge, tensors of 64 MiB'] / tensors:.0%} of the library's ranges of the same size")
    print(f"read, forward: {speed['read, mmerge, forward in blocks'] / alone:.0%} of the library's one stream")


if __name__ == "__main__":
    main()
