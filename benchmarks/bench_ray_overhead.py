"""Measure the overhead of Ray: a local cluster of one node against `serial`.

The start of the cluster is reported separately.

    python benchmarks/bench_ray_overhead.py --shape 1.1b --repeats 5 --forecast
    python benchmarks/bench_ray_overhead.py --shape 1.1b --inputs build/bench/1.1b/inputs --out
    build/ray-overhead.json

Both executors have the same number of cores, run in turn, from a fresh store each, in one process;
workers have run a small build before. Wall time is what a user waits; the CPU time of all processes
is told beside it, because it hardly depends on who else uses the machine. With --forecast the
scheduler's simulation of the Ray run stands beside it, with the rates that the runs themselves
measured. Prints a table, and writes one row of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, Shape, make_checkpoints
from measure import descendants, touch_free_memory

ROOT = Path(__file__).resolve().parent.parent
WARM = Shape(hidden=256, ffn=512, layers=24, heads=4, kv_heads=4, vocabulary=64)
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Build:
    """One measured build: wall seconds, CPU seconds of all processes, and its run record."""

    wall_s: float
    cpu_s: float
    status: Any


def read_cpu() -> dict[int, float]:
    """Return the seconds of CPU of this process and of all below it, by process id."""
    cpu_seconds = {}
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        cpu_seconds[pid] = (int(fields[11]) + int(fields[12])) / TICK
    return cpu_seconds


def build(plan: Any, store: Path, executor: Any) -> Build:
    """Return one build from nothing."""
    from mmerge.manifests.stores.open import open_store
    from mmerge.pipeline import run
    from mmerge.pipeline.monitoring.run_records import RunRecord, begin_run

    shutil.rmtree(store, ignore_errors=True)
    touch_free_memory(2 * plan.bytes_out)
    opened = open_store(str(store), create=True)
    before, began = read_cpu(), time.monotonic()
    with RunRecord(opened, begin_run(opened, "bench", exclusive=False)) as record:
        run(plan, executor=executor, progress=record)
    wall, after = time.monotonic() - began, read_cpu()
    shutil.rmtree(store)
    return Build(
        wall, sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items()), record.status
    )


def make_bench_plan(paths: list[Path], store: Path, scope: str) -> Any:
    """Return the plan of an MMER merge of these checkpoints."""
    from mmerge.pipeline import make_plan, parse_recipe

    experts = {path.name: {"path": str(path), "modality": path.name} for path in paths[1:]}
    raw = {
        "name": "bench",
        "base": str(paths[0]),
        "method": "mmer",
        "output": str(store),
        "experts": experts,
        "scope": scope,
    }
    return make_plan(parse_recipe(raw, folder=store.parent))


def print_phases(label: str, build: Build) -> None:
    """Print where the wall time of a build went."""
    phases = build.status.phases
    told = ", ".join(
        f"{name} {phase.wall_seconds:.2f} s ({phase.seconds:.2f} in {phase.num_done} tasks)"
        for name, phase in phases.items()
    )
    outside = build.wall_s - sum(phase.wall_seconds for phase in phases.values())
    print(
        f"  {label}: {build.wall_s:.2f} s, {build.cpu_s:.2f} s of CPU; {told}; between phases"
        f" {outside:.2f} s",
        flush=True,
    )


def main() -> int:
    """Print the measured times, and write them as a row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b")
    parser.add_argument(
        "--inputs",
        type=Path,
        default=None,
        help="folder with base, expert0, …; created if absent",
    )
    parser.add_argument("--scope", choices=("model", "tensor"), default="model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--nodes", type=int, default=1, help="raylets that share the workers")
    parser.add_argument("--forecast", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "ray-overhead.json")
    options = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"

    from mmerge.pipeline import run
    from mmerge.pipeline.execution.executor import SerialExecutor
    from mmerge.pipeline.execution.ray_executor import RayExecutor

    work = ROOT / "build" / "bench" / "ray-overhead"
    work.mkdir(parents=True, exist_ok=True)
    inputs = options.inputs.resolve() if options.inputs else None
    paths = (
        sorted(inputs.iterdir())
        if inputs
        else make_checkpoints(
            work.parent / options.shape / "inputs", SHAPES[options.shape], num_experts=3
        )
    )
    for path in paths:
        for file in path.glob("*.safetensors"):
            with file.open("rb") as opened:  # into the page cache
                while opened.read(64 << 20):
                    pass
    plan = make_bench_plan(paths, work / "store", options.scope)
    print(
        f"{options.shape}: {plan.num_parameters / 1e9:.2f}e9 parameters, {plan.bytes_in / 1e9:.2f}"
        f" GB in, {len(plan.merge_shards)} merge shards"
    )
    cluster = start_cluster(options.nodes, options.workers) if options.nodes > 1 else None
    ray = (
        RayExecutor(address=cluster.address)
        if cluster
        else RayExecutor(num_workers=options.workers)
    )
    executors = {"serial": SerialExecutor(num_threads=options.workers), "ray": ray}
    small = make_bench_plan(
        make_checkpoints(work.parent / "warm" / "inputs", WARM, num_experts=3),
        work / "warm-store",
        options.scope,
    )
    run(small, executor=executors["serial"], fresh=True)
    print(
        f"  start of the workers {build(small, work / 'warm-store', ray).status.start_seconds:.1f}"
        " s, the cluster's included"
    )
    task_seconds = min(
        measure_task_seconds(build(small, work / "warm-store", ray), options.workers)
        for _ in range(3)
    )
    print(f"  lost between two tasks of a core: {task_seconds * 1000:.1f} ms", flush=True)
    builds: dict[str, list[Build]] = {label: [] for label in executors}
    for _ in range(options.repeats):
        for label, executor in executors.items():
            builds[label].append(build(plan, work / "store", executor))
            print_phases(label, builds[label][-1])
    ray.close()
    if cluster:
        cluster.shutdown()
    shutil.rmtree(work)
    row = make_row(builds, options)
    print(
        f"Ray against serial, {options.workers} cores: best {row['wall_ratio_best'] - 1:+.1%},"
        f" median {row['wall_ratio_median'] - 1:+.1%}, CPU {row['cpu_ratio_median'] - 1:+.1%}"
    )
    if options.forecast:
        row |= forecast(plan, builds["ray"], options, task_seconds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    options.out.write_text(json.dumps([*rows, row], indent=1) + "\n")
    return 0


def start_cluster(num_nodes: int, num_workers: int) -> Any:
    """Return a Ray cluster of several raylets on this machine, which share so many workers."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(num_nodes):
        cluster.add_node(num_cpus=num_workers // num_nodes, object_store_memory=100 << 20)
    return cluster


def measure_task_seconds(build: Build, num_workers: int) -> float:
    """Return what a core loses from one task to the next, seen on a build of many small tasks."""
    phases = [phase for phase in build.status.phases.values() if phase.num_done]
    lost = sum(phase.wall_seconds * num_workers - phase.seconds for phase in phases)
    return float(max(lost, 0.0) / sum(phase.num_done for phase in phases))


def make_row(builds: dict[str, list[Build]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the measured times and their ratios."""
    walls = {label: [build.wall_s for build in group] for label, group in builds.items()}
    cpus = {label: [build.cpu_s for build in group] for label, group in builds.items()}
    return {
        "shape": options.shape,
        "scope": options.scope,
        "workers": options.workers,
        "nodes": options.nodes,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "wall_s": walls,
        "cpu_s": cpus,
        "wall_ratio_best": min(walls["ray"]) / min(walls["serial"]),
        "wall_ratio_median": statistics.median(walls["ray"]) / statistics.median(walls["serial"]),
        "cpu_ratio_median": statistics.median(cpus["ray"]) / statistics.median(cpus["serial"]),
    }


def forecast(
    plan: Any, builds: list[Build], options: argparse.Namespace, task_seconds: float
) -> dict[str, Any]:
    """Return the relative error of the simulation for each run.

    Once with the rates of that run, once with those of the run before it.
    """
    from mmerge.pipeline.build.simulation import simulate, to_rates
    from mmerge.pipeline.execution.simulated_cluster import Nodes

    nodes = Nodes(options.nodes, options.workers // options.nodes, 1e12, 1e12)
    own_errors: list[float] = []
    earlier: list[float] = []
    for index, real in enumerate(builds):
        for label, errors, source in (
            ("itself", own_errors, real),
            ("the run before", earlier, builds[index - 1] if index else None),
        ):
            if source is not None:
                rates = replace(to_rates(source.status), task_seconds=task_seconds)
                seconds = simulate(plan, nodes, rates=rates).seconds
                errors.append(seconds / real.wall_s - 1)
                print(
                    f"  forecast with the rates of {label}: {seconds:.2f} s, real {real.wall_s:.2f}"
                    f" s ({errors[-1]:+.1%})"
                )
    return {
        "task_seconds": task_seconds,
        "forecast_errors_own_rates": own_errors,
        "forecast_errors_earlier_rates": earlier,
    }


if __name__ == "__main__":
    sys.exit(main())
