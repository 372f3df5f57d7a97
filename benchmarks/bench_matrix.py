"""Measure whole-matrix methods beside a plain loop of torch over the same tensors: the same arithmetic, on as many threads.

    python benchmarks/bench_matrix.py
    python benchmarks/bench_matrix.py --hidden 2048 --ffn 5632 --methods iso_c swudi

Both run in turn on the same files, one core each: our merge tasks, and a loop that reads the tensors of base and experts with
safetensors, computes, and writes one file. The results are compared bit by bit. `--batch` measures what it brings on this machine to
give equal matrices to the library in one call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoints import Shape, make_checkpoints
from measure import measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.workers.run_task import run_task
from mmerge.workers.task import MergeTask, Task, TaskResult

NUM_EXPERTS = 3
Svd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main() -> None:
    """Print the table, or with `--side` run one side of one row."""
    options = _parse()
    torch.set_num_threads(1)
    if options.batch:
        measure_batches(options.hidden)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.inputs or Path(place) / "inputs")
        shape = Shape(options.hidden, options.ffn, options.layers, options.hidden // 64, max(1, options.hidden // 256), vocabulary=64)
        make_checkpoints(folder, shape, num_experts=NUM_EXPERTS)
        for method in options.methods:
            numbers = {"iterations": options.iterations} if method in ("wudi", "optmerge") else {}
            if options.side:
                _report_side(options.side, folder, method, numbers, Path(place))
            else:
                _print_row(options, folder, method, numbers, Path(place))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=30, help="of WUDI and OptMerge (a recipe's default is 300)")
    parser.add_argument("--methods", nargs="*", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--repeat", type=int, default=2, help="turns of both sides; the fastest of each counts")
    parser.add_argument("--batch", action="store_true", help="one call for three equal matrices, beside three calls")
    parser.add_argument("--side", choices=("ours", "plain"), help="run one side alone, and print its seconds")
    parser.add_argument("--inputs", help="folder of the checkpoints; a temporary one if absent")
    return parser.parse_args()


def _print_row(options: argparse.Namespace, folder: Path, method: str, numbers: dict[str, Any], place: Path) -> None:
    """Run both sides in turn, each as a process of its own, and print the fastest of each."""
    best: dict[str, tuple[float, float, float]] = {}
    for _ in range(options.repeat):
        for side in ("ours", "plain"):
            command = [sys.executable, __file__, "--side", side, "--inputs", str(folder), "--methods", method]
            for name in ("hidden", "ffn", "layers", "iterations"):
                command += [f"--{name}", str(getattr(options, name))]
            found = measure(command, log=place / "side.log")
            said = json.loads((place / "side.log").read_text().splitlines()[-1])
            row = (said["wall_s"], said["cpu_s"], found.peak_bytes / 1e6)
            best[side] = min(best.get(side, row), row)
    equal = _compare(folder, method, numbers, place)
    (wall, cpu, peak), (plain_wall, plain_cpu, plain_peak) = best["ours"], best["plain"]
    print(
        f"{method:<10} ours {wall:7.2f} s, CPU {cpu:7.2f} s, {peak:5.0f} MB   plain loop {plain_wall:7.2f} s, CPU {plain_cpu:7.2f} s, "
        f"{plain_peak:5.0f} MB   ratio {wall / plain_wall:.2f}, CPU {cpu / plain_cpu:.2f}   {equal}",
        flush=True,
    )


def _report_side(side: str, folder: Path, method: str, numbers: dict[str, Any], place: Path) -> None:
    # What the library loads at its first use belongs to neither: torch.optim.Adam imports for two seconds.
    torch.linalg.svd(torch.eye(8))
    _adam(torch.eye(8), torch.eye(8), torch.eye(8), 1)
    wall, cpu = run_ours(folder, method, numbers, place / "store") if side == "ours" else run_plain(folder, method, numbers, place / "out")
    print(json.dumps({"wall_s": wall, "cpu_s": cpu}))


class _OneByOne:
    """An executor of this process that adds up what merge tasks take."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def run(self, tasks: Sequence[Task], store_uri: str) -> Iterator[tuple[Task, TaskResult | Exception]]:
        for task in tasks:
            cpu, began = time.process_time(), time.monotonic()
            result = run_task(task, store_uri)
            if isinstance(task, MergeTask):
                self.wall, self.cpu = self.wall + time.monotonic() - began, self.cpu + time.process_time() - cpu
            yield task, result

    def close(self) -> None:
        """Nothing is open."""


def run_ours(folder: Path, method: str, numbers: Mapping[str, Any], store: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of the merge tasks of a build into a new store."""
    experts = {path.name: {"path": str(path), "modality": "image"} for path in sorted(folder.glob("expert*"))}
    raw = {"name": "matrix", "base": str(folder / "base"), "experts": experts, "method": method, "output": str(store), **numbers}
    executor = _OneByOne()
    run(make_plan(parse_recipe(raw, folder=folder)), executor=executor)
    return executor.wall, executor.cpu


def run_plain(folder: Path, method: str, numbers: Mapping[str, Any], out: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of a loop over all tensors: read, merge, write."""
    cpu, began = time.process_time(), time.monotonic()
    merge = PLAIN[method]
    paths = [folder / "base", *sorted(folder.glob("expert*"))]
    index = json.loads((folder / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    merged = {}
    for name, file in index.items():
        base, *experts = (_read(path / file, name) for path in paths)
        if ".layers." in name and base.dim() == 2:
            base = base + merge([expert - base for expert in experts], **numbers)
        merged[name] = base.to(torch.bfloat16)
    out.mkdir()
    save_file(merged, out / "model.safetensors")
    return time.monotonic() - began, time.process_time() - cpu


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        found: torch.Tensor = tensors.get_tensor(name)
        return found.to(torch.float32)


def _compare(folder: Path, method: str, numbers: Mapping[str, Any], place: Path) -> str:
    run_ours(folder, method, numbers, place / method / "store")
    run_plain(folder, method, numbers, place / method / "out")
    plain = load_file(place / method / "out" / "model.safetensors")
    ours: dict[str, torch.Tensor] = {}
    for file in (place / method / "store" / "objects").glob("*.safetensors"):
        ours |= load_file(file)
    assert ours.keys() == plain.keys(), ours.keys() ^ plain.keys()
    different = [name for name in plain if not torch.equal(ours[name], plain[name])]
    return f"{len(different)} of {len(plain)} tensors differ" if different else "equal bits"


def _svd(matrix: torch.Tensor) -> Svd:
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return u, s, vt


def _iso_c(deltas: list[torch.Tensor]) -> torch.Tensor:
    u, s, vt = _svd(_sum(deltas))
    return (u @ vt) * (s.sum() / len(s))


def _tsv(deltas: list[torch.Tensor]) -> torch.Tensor:
    share = min(deltas[0].shape) // len(deltas)
    parts = [_svd(delta) for delta in deltas]
    left, _, left_t = _svd(torch.cat([u[:, :share] for u, _, _ in parts], dim=1))
    right, _, right_t = _svd(torch.cat([vt[:share] for _, _, vt in parts]))
    return (left @ left_t * torch.cat([s[:share] for _, s, _ in parts])) @ (right @ right_t)


def _sum(deltas: list[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(deltas[0])
    for delta in deltas:
        total += delta
    return total


def _quadratic(targets: list[torch.Tensor], rows: list[torch.Tensor], deltas: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    width = deltas[0].shape[1]
    c, d = torch.zeros(width, width), torch.zeros_like(deltas[0])
    for target, row, delta in zip(targets, rows, deltas, strict=True):
        scatter = row.T @ row / float(delta.norm().square())
        c += scatter
        d += target @ scatter
    return c, d


def _adam(start: torch.Tensor, c: torch.Tensor, d: torch.Tensor, iterations: int) -> torch.Tensor:
    merged = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(iterations):
        merged.grad = 2 * (merged.detach() @ c - d)
        optimizer.step()
    return merged.detach()


def _wudi(deltas: list[torch.Tensor], iterations: int) -> torch.Tensor:
    return _adam(_sum(deltas), *_quadratic(deltas, deltas, deltas), iterations)


def _optmerge(deltas: list[torch.Tensor], iterations: int) -> torch.Tensor:
    rank, mean = min(deltas[0].shape) // len(deltas), _sum(deltas) / len(deltas)
    targets, rows = [], []
    for delta in deltas:
        u, s, vt = _svd(delta - mean)
        targets.append((u[:, :rank] * s[:rank]) @ vt[:rank] + mean)
        _, s, vt = _svd(delta)
        rows.append(s[:rank].unsqueeze(-1) * vt[:rank])
    return _adam(_sum(deltas), *_quadratic(targets, rows, deltas), iterations)


def _swudi(deltas: list[torch.Tensor]) -> torch.Tensor:
    c, d = _quadratic(deltas, deltas, deltas)
    values, basis = torch.linalg.eigh(c)
    values = values.clamp(min=1e-8)
    kept = 1 - torch.exp(-values * 300.0)
    kept[: len(values) - max(1, int(len(values) * 0.65 + 0.999))] = 0
    first = _sum(deltas)
    return first - (first @ basis * kept) @ basis.T + (d @ basis * (kept / values)) @ basis.T


PLAIN: Mapping[str, Callable[..., torch.Tensor]] = {
    "iso_c": _iso_c, "tsv": _tsv, "swudi": _swudi, "wudi": _wudi, "optmerge": _optmerge,
}  # fmt: skip
"""By method, the merged task vector of one matrix, written down without this project's code."""


def measure_batches(hidden: int) -> None:
    """Print what one call for three square matrices takes, beside three calls: the fastest of three turns."""
    stack = torch.randn(3, hidden, hidden, generator=torch.Generator().manual_seed(0))
    symmetric = stack @ stack.transpose(1, 2)
    calls: Mapping[str, tuple[torch.Tensor, Callable[[torch.Tensor], Any]]] = {
        "svd": (stack, lambda matrix: torch.linalg.svd(matrix, full_matrices=False)),
        "eigh": (symmetric, torch.linalg.eigh),
        "product": (stack, lambda matrix: matrix @ matrix),
    }
    for name, (matrices, call) in calls.items():
        one, single = float("inf"), float("inf")
        for _ in range(3):
            began = time.monotonic()
            call(matrices)
            middle = time.monotonic()
            for matrix in matrices:
                call(matrix)
            one, single = min(one, middle - began), min(single, time.monotonic() - middle)
        print(f"{name:<8} 3 × {hidden}²: one call {one:.3f} s, three calls {single:.3f} s, ratio {one / single:.2f}", flush=True)


if __name__ == "__main__":
    main()
