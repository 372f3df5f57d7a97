"""Measure builds of synthetic checkpoints, beside mergekit on the same files where it is installed.

    python benchmarks/bench_build.py --shape 300m
    python benchmarks/bench_build.py --shape 1.1b --peers build/peers-venv --out build/bench.json

Every run is a process of its own into an empty folder; inputs are in the page cache. Each method is
run in turn with its peer, so that both see the same machine. The floor is the time to read the
inputs and write as much as the build does with nothing computed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from checkpoints import SHAPES, make_checkpoints
from measure import Measured, measure, touch_free_memory

ROOT = Path(__file__).resolve().parent.parent
BLOCK_BYTES = 1 << 19
COMPUTE_BOUND = ("mmer_model", "della", "sce")
"""Rows that are measured with one worker and with two."""
TOUCHED_BYTES = 5 << 30
"""More than any run allocates: its processes and the pages of its output."""

OURS: Mapping[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.5},
    "slerp": {"method": "slerp", "t": 0.5},
    "ties": {"method": "ties", "density": 0.2, "scope": "tensor"},
    "ties_model": {"method": "ties", "density": 0.2, "scope": "model"},
    "dare_ties": {"method": "dare_ties", "density": 0.5},
    "della": {"method": "della", "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"method": "breadcrumbs", "density": 0.5, "gamma": 0.01},
    "sce": {"method": "sce", "select_topk": 0.2},
    "mmer": {"method": "mmer", "density": 0.8, "scope": "tensor"},
    "mmer_model": {"method": "mmer", "density": 0.8, "scope": "model"},
}
"""Recipes by row of the table."""

PEERS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", {}, {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.5}, {"weight": 1.0}),
    "slerp": ("slerp", {"t": 0.5}, {}),
    "ties": ("ties", {"normalize": True}, {"weight": 1.0, "density": 0.2}),
    "dare_ties": ("dare_ties", {}, {"weight": 1.0, "density": 0.5}),
    "della": ("della", {"epsilon": 0.1}, {"weight": 1.0, "density": 0.5}),
    "breadcrumbs": ("breadcrumbs", {"gamma": 0.01}, {"weight": 1.0, "density": 0.5}),
    "sce": ("sce", {"select_topk": 0.2}, {}),
}
"""mergekit's method, its parameters, and those of each model."""


def main() -> None:
    """Run the benchmark and print its tables."""
    options = _parse()
    shape = SHAPES[options.shape]
    work = ROOT / "build" / "bench" / options.shape
    paths = make_checkpoints(work / "inputs", shape, num_experts=3)
    small = make_checkpoints(
        ROOT / "build" / "bench" / "60m" / "inputs", SHAPES["60m"], num_experts=3
    )
    rows: list[dict[str, Any]] = []
    floors: dict[tuple[int, int], float] = {}

    def find_floor(num_inputs: int, output_bytes: int) -> float:
        key = (num_inputs, output_bytes)
        if key not in floors:
            floors[key], cpu = measure_floor(paths[:num_inputs], output_bytes, work)
            name = f"floor, {num_inputs} read, {output_bytes / 1e9:.1f} GB written"
            rows.append(_row(name, Measured(floors[key], cpu, 0, 0), shape.num_bytes * num_inputs))
            _print(rows[-1], None)
        return floors[key]

    names = options.methods or list(OURS)
    for name in names:
        num_inputs = 2 if name == "slerp" else 4
        floor_s = find_floor(num_inputs, _output_bytes(name, shape.num_bytes))
        run_ours(name, small[:num_inputs], work)  # compiles the kernels
        measured = min(
            (run_ours(name, paths[:num_inputs], work) for _ in range(options.repeat)),
            key=lambda run: run.wall_s,
        )
        row = _row(name, measured, shape.num_bytes * num_inputs) | {
            "over_floor": measured.wall_s / floor_s
        }
        if options.peers and name in PEERS:
            peer = run_peer(name, paths[:num_inputs], work, options.peers)
            row |= {
                "peer_wall_s": peer.wall_s,
                "peer_cpu_s": peer.cpu_s,
                "peer_peak_bytes": peer.peak_bytes,
            }
            row["speedup"] = peer.wall_s / measured.wall_s
        rows.append(row)
        _print(row, floor_s)
        _write_report(options.out, options.shape, shape.num_bytes * 4, rows)
    for name, change in (
        ("ties", "density"),
        ("mmer_model", "mask_scale"),
        ("mmer_model", "density"),
    ):
        if name in names:
            again = run_again(name, paths, work, change)
            floor_s = find_floor(4, _output_bytes(name, shape.num_bytes, again=True))
            row = _row(f"{name}, another {change}", again[0], shape.num_bytes * 4)
            rows.append(row | {"bytes_read": again[1], "over_floor": again[0].wall_s / floor_s})
            _print(rows[-1], floor_s)
    for name in COMPUTE_BOUND:
        if name in names and len(os.sched_getaffinity(0)) > 1:
            single_worker, two_workers = (
                run_ours(name, paths, work, "--workers", str(number)) for number in (1, 2)
            )
            row = _row(f"{name}, one worker", single_worker, shape.num_bytes * 4) | {
                "two_workers": single_worker.wall_s / two_workers.wall_s
            }
            rows.append(row)
            _print(row, None)
    _write_report(options.out, options.shape, shape.num_bytes * 4, rows)


def _output_bytes(name: str, model_bytes: int, *, again: bool = False) -> int:
    """Return the bytes that a build writes.

    A plain build writes one model; MMER writes τ⋆, three masks of one bit per entry, and the base.
    """
    if not name.startswith("mmer"):
        return model_bytes
    return model_bytes + 3 * model_bytes // 16 + (0 if again else model_bytes)


def _write_report(path: Path, shape: str, input_bytes: int, rows: list[dict[str, Any]]) -> None:
    report = {
        "shape": shape,
        "input_bytes": input_bytes,
        "machine": _machine(),
        "load": os.getloadavg(),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="300m")
    parser.add_argument("--methods", nargs="*", choices=OURS, help="rows to measure; all if absent")
    parser.add_argument("--peers", type=Path, help="a virtual environment that has mergekit")
    parser.add_argument(
        "--repeat",
        type=int,
        default=2,
        help="runs of ours per row; the fastest counts (a peer runs once)",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json")
    return parser.parse_args()


def _prepare(paths: list[Path]) -> None:
    """Touch memory and read the inputs, so that every run starts in the same state.

    On a virtual machine the first touch after a pause can take many times as long as a later one.
    """
    touch_free_memory(TOUCHED_BYTES)
    _read_all(paths)


def _read_all(paths: list[Path]) -> None:
    """Bring the inputs into the page cache."""
    for path in paths:
        for file in path.glob("*.safetensors"):
            with file.open("rb", buffering=0) as data:
                while data.read(64 << 20):
                    pass


def measure_floor(paths: list[Path], output_bytes: int, work: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of the I/O bound.

    Two threads read all inputs and write an output of one model's size, with nothing computed.
    """
    files = [file for path in paths for file in path.glob("*.safetensors")]
    target = work / "floor.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    total = sum(file.stat().st_size for file in files)
    num_threads = len(os.sched_getaffinity(0))
    pieces = [(file, start) for file in files for start in range(0, file.stat().st_size, 64 << 20)]
    descriptor = os.open(target, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    sources = {file: os.open(file, os.O_RDONLY) for file in files}

    def copy(part: int) -> None:
        buffer = np.empty(BLOCK_BYTES, np.uint8)
        mine = pieces[part::num_threads]
        written = 0
        for index, (file, start) in enumerate(mine):
            for offset in range(start, start + (64 << 20), BLOCK_BYTES):
                os.preadv(sources[file], [buffer.data], offset)
            while written < output_bytes // num_threads * (index + 1) // len(mine):
                written += os.pwrite(
                    descriptor, buffer.data, part * (output_bytes // num_threads) + written
                )

    best = (float("inf"), 0.0)
    _prepare(paths)
    for _ in range(2):
        os.ftruncate(descriptor, 0)
        before, began = time.process_time(), time.monotonic()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(copy, range(num_threads)))
        os.fsync(descriptor)
        best = min(best, (time.monotonic() - began, time.process_time() - before))
    for number in (descriptor, *sources.values()):
        os.close(number)
    target.unlink()
    assert total > 0
    return best


def _recipe(
    name: str, paths: list[Path], output: Path, changes: Mapping[str, Any]
) -> dict[str, Any]:
    experts = {path.name: {"path": str(path), "modality": "image"} for path in paths[1:]}
    return {
        **OURS[name],
        **changes,
        "name": "bench",
        "base": str(paths[0]),
        "experts": experts,
        "output": str(output),
    }


def _run_recipe(recipe: dict[str, Any], work: Path, paths: list[Path], *more: str) -> Measured:
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    command = [
        sys.executable,
        "-m",
        "mmerge.pipeline.cli.main",
        "run",
        str(file),
        "--executor",
        "processes",
        *more,
    ]
    _prepare(paths)
    return measure(command, log=work / "ours.log")


def run_ours(name: str, paths: list[Path], work: Path, *more: str) -> Measured:
    """Return what a first build takes, into a new store: scan, thresholds, merge, manifest."""
    work.mkdir(parents=True, exist_ok=True)
    output = Path(tempfile.mkdtemp(dir=work))
    try:
        return _run_recipe(_recipe(name, paths, output, {}), work, paths, *more)
    finally:
        shutil.rmtree(output)


def run_again(name: str, paths: list[Path], work: Path, change: str) -> tuple[Measured, str]:
    """Return the cost of a rebuild with another parameter, and its report of bytes read."""
    output = Path(tempfile.mkdtemp(dir=work))
    try:
        _run_recipe(_recipe(name, paths, output, {}), work, paths)
        measured = _run_recipe(_recipe(name, paths, output, {change: 0.6}), work, paths)
        read = (work / "ours.log").read_text().rpartition("Read ")[2].split("\n")[0]
        return measured, read
    finally:
        shutil.rmtree(output)


def run_peer(name: str, paths: list[Path], work: Path, peers: Path) -> Measured:
    """Return what mergekit takes for the same merge."""
    method, parameters, per_model = PEERS[name]
    models = [
        {"model": str(path), "parameters": per_model} if per_model else {"model": str(path)}
        for path in paths[1:]
    ]
    config: dict[str, Any] = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": models,
        "parameters": parameters,
    }
    if method == "slerp":
        config["models"] = [{"model": str(path)} for path in paths]
    if method != "linear":
        config["base_model"] = str(paths[0])
    file, output = work / "peer.yaml", Path(tempfile.mkdtemp(dir=work))
    file.write_text(yaml.safe_dump(config))
    try:
        command = [
            str(peers / "bin" / "mergekit-yaml"),
            str(file),
            str(output / "model"),
            "--no-copy-tokenizer",
        ]
        _prepare(paths)
        return measure(command, environment={"HF_HUB_OFFLINE": "1"}, log=work / "peer.log")
    finally:
        shutil.rmtree(output)


def _row(name: str, measured: Measured, input_bytes: int) -> dict[str, Any]:
    return {
        "method": name,
        "wall_s": measured.wall_s,
        "cpu_s": measured.cpu_s,
        "peak_bytes": measured.peak_bytes,
        "peak_private_bytes": measured.peak_private_bytes,
        "input_gb_s": input_bytes / measured.wall_s / 1e9,
        "speedup": None,
    }


def _print(row: dict[str, Any], floor_s: float | None) -> None:
    text = (
        f"{row['method']:<34} {row['wall_s']:8.2f} s  CPU {row['cpu_s']:8.2f} s "
        f" {row['peak_bytes'] / 1e6:7.0f} MB"
    )
    text += f"  ({row['peak_private_bytes'] / 1e6:5.0f} private)  {row['input_gb_s']:6.2f} GB/s"
    if floor_s:
        text += f"  {row['wall_s'] / floor_s:6.1f} x floor"
    if row["speedup"]:
        text += (
            f"   peer {row['peer_wall_s']:7.1f} s, {row['peer_peak_bytes'] / 1e6:6.0f} MB:"
            f" {row['speedup']:.1f} x"
        )
    if "two_workers" in row:
        text += f"   two workers: {row['two_workers']:.2f} x"
    if "bytes_read" in row:
        text += f"   read {row['bytes_read']}"
    print(text, flush=True)


def _machine() -> str:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        "",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu or platform.machine()}, {memory:.0f} GB,"
        f" Python {platform.python_version()}"
    )


if __name__ == "__main__":
    main()
