"""Measure whole-matrix methods beside a plain torch loop with the same arithmetic.

Both use the same tensors and the same number of threads.

    python benchmarks/bench_matrix.py
    python benchmarks/bench_matrix.py --hidden 2048 --ffn 5632 --methods iso_c swudi

Both take turns matrix by matrix in one process, on one thread: our merge task, and a loop that
reads the tensors of base and experts with safetensors, computes, and writes a file. The results are
compared bit by bit; peak memory is that of a process of its own. `--batch` measures what it brings
on this machine to give equal matrices to the library in one call.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkpoints import Shape, make_checkpoints
from measure import measure
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.pipeline.execution.scheduler import Follow, Outcomes, nothing_follows
from mmerge.workers.task import MergeTask, Task, TaskResult
from mmerge.workers.tasks.run import run_task

NUM_EXPERTS = 3
Svd = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main() -> None:
    """Print the table, or with `--side` run one side of one row alone."""
    options = _parse()
    torch.set_num_threads(1)
    if options.batch:
        measure_batches(options.hidden, options.repeat)
        return
    # Imports at first use count for neither side: torch.optim.Adam imports for two seconds.
    torch.linalg.svd(torch.eye(8))
    _adam(torch.eye(8), torch.eye(8), torch.eye(8), 1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.inputs or Path(place) / "inputs")
        shape = Shape(
            options.hidden,
            options.ffn,
            options.layers,
            options.hidden // 64,
            max(1, options.hidden // 256),
            vocabulary=64,
        )
        make_checkpoints(folder, shape, num_experts=NUM_EXPERTS)
        for method in options.methods:
            numbers = {"iterations": options.iterations} if method in ("wudi", "optmerge") else {}
            sides = _Sides(
                folder,
                PLAIN[method],
                numbers,
                Path(place) / method,
                repeat=options.repeat,
                only=options.side,
            )
            sides.build(method)
            if not options.side:
                peaks = [
                    _measure_peak(options, folder, method, side, Path(place))
                    for side in ("ours", "plain")
                ]
                _print_row(method, sides, peaks)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument(
        "--iterations",
        type=int,
        default=30,
        help="of WUDI and OptMerge (a recipe's default is 300)",
    )
    parser.add_argument("--methods", nargs="*", choices=PLAIN, default=list(PLAIN))
    parser.add_argument(
        "--repeat",
        type=int,
        default=2,
        help="rounds of both sides per matrix; the fastest of each counts",
    )
    parser.add_argument(
        "--batch", action="store_true", help="one call for three equal matrices, beside three calls"
    )
    parser.add_argument(
        "--side", choices=("ours", "plain"), help="run one side alone, once: for its peak memory"
    )
    parser.add_argument("--inputs", help="folder of the checkpoints; a temporary one if absent")
    return parser.parse_args()


class _Sides:
    """An executor that runs every merge task and the plain loop over its tensors in turn."""

    def __init__(
        self,
        folder: Path,
        merge: Callable[..., torch.Tensor],
        numbers: dict[str, Any],
        place: Path,
        *,
        repeat: int,
        only: str | None,
    ) -> None:
        self._folder, self._merge, self._numbers, self._place = folder, merge, numbers, place
        self._turns = [
            side
            for _ in range(1 if only else repeat)
            for side in ("ours", "plain")
            if only in (None, side)
        ]
        self.wall, self.cpu = {"ours": 0.0, "plain": 0.0}, {"ours": 0.0, "plain": 0.0}
        self.num_tensors = self.num_different = 0
        self._is_alone = only is not None
        place.mkdir()

    def build(self, method: str) -> None:
        """Run a build into a new store, all its tasks here."""
        experts = {
            path.name: {"path": str(path), "modality": "image"}
            for path in sorted(self._folder.glob("expert*"))
        }
        raw = {
            "name": "matrix",
            "base": str(self._folder / "base"),
            "experts": experts,
            "method": method,
            "output": str(self._place / "store"),
        }
        plan = make_plan(parse_recipe(raw | self._numbers, folder=self._folder))
        if self._turns == ["plain"]:
            self._plain([tensor.name for shard in plan.merge_shards for tensor in shard.tensors])
        else:
            run(plan, executor=self)

    def run(
        self, tasks: Sequence[Task], store_uri: str, follow: Follow = nothing_follows
    ) -> Outcomes:
        """Yield each task with its result; tasks that would follow are not requested."""
        for task in tasks:
            yield (
                task,
                (
                    self._measure(task, store_uri)
                    if isinstance(task, MergeTask)
                    else run_task(task, store_uri)
                ),
            )

    def close(self) -> None:
        """Nothing is open."""

    def _measure(self, task: MergeTask, store_uri: str) -> TaskResult:
        best = {"ours": (float("inf"), 0.0), "plain": (float("inf"), 0.0)}
        names = [tensor.name for tensor in task.tensors]
        for side in self._turns:
            cpu, began = time.process_time(), time.monotonic()
            if side == "ours":
                result = run_task(replace(task, fresh=True), store_uri)
            else:
                self._plain(names)
            best[side] = min(best[side], (time.monotonic() - began, time.process_time() - cpu))
        if not self._is_alone:
            for side, (wall, cpu) in best.items():
                self.wall[side], self.cpu[side] = self.wall[side] + wall, self.cpu[side] + cpu
            ours, plain = (
                load_file(self._place / "store" / result.entry.object.key),
                load_file(self._place / "plain.safetensors"),
            )
            self.num_tensors += len(plain)
            self.num_different += sum(not torch.equal(ours[name], plain[name]) for name in plain)
        return result

    def _plain(self, names: Sequence[str]) -> None:
        """Read these tensors of base and experts, merge, and write one file."""
        paths = [self._folder / "base", *sorted(self._folder.glob("expert*"))]
        index = json.loads((paths[0] / "model.safetensors.index.json").read_text())["weight_map"]
        merged = {}
        for name in names:
            base, *experts = (_read(path / index[name], name) for path in paths)
            if ".layers." in name and base.dim() == 2:
                base = base + self._merge([expert - base for expert in experts], **self._numbers)
            merged[name] = base.to(torch.bfloat16)
        save_file(merged, self._place / "plain.safetensors")


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor.to(torch.float32)


def _measure_peak(
    options: argparse.Namespace, folder: Path, method: str, side: str, place: Path
) -> int:
    """Return the peak memory of a process that runs one side alone."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--inputs",
        str(folder),
        "--methods",
        method,
    ]
    for name in ("hidden", "ffn", "layers", "iterations"):
        command += [f"--{name}", str(getattr(options, name))]
    return measure(command, log=place / "side.log").peak_bytes


def _print_row(method: str, sides: _Sides, peaks: Sequence[int]) -> None:
    ours, plain = (
        (sides.wall[side], sides.cpu[side], peak / 1e6)
        for side, peak in zip(("ours", "plain"), peaks, strict=True)
    )
    equal = (
        f"{sides.num_different} of {sides.num_tensors} tensors differ"
        if sides.num_different
        else "equal bits"
    )
    print(
        f"{method:<10} ours {ours[0]:6.2f} s, CPU {ours[1]:6.2f} s, {ours[2]:5.0f} MB   plain loop"
        f" {plain[0]:6.2f} s, CPU {plain[1]:6.2f} s, {plain[2]:5.0f} MB   ratio"
        f" {ours[0] / plain[0]:.2f}, CPU {ours[1] / plain[1]:.2f}   {equal}",
        flush=True,
    )


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


def _quadratic(
    targets: list[torch.Tensor], rows: list[torch.Tensor], deltas: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
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
    merged: torch.Tensor = (
        first - (first @ basis * kept) @ basis.T + (d @ basis * (kept / values)) @ basis.T
    )
    return merged


PLAIN: Mapping[str, Callable[..., torch.Tensor]] = {
    "iso_c": _iso_c,
    "tsv": _tsv,
    "swudi": _swudi,
    "wudi": _wudi,
    "optmerge": _optmerge,
}
"""By method, the merged task vector of one matrix, written down without this project's code."""


def measure_batches(hidden: int, repeat: int) -> None:
    """Print the CPU seconds of one call for three square matrices and of three calls.

    One thread, the fastest of several rounds.
    """
    stack = torch.randn(3, hidden, hidden, generator=torch.Generator().manual_seed(0))
    symmetric = stack @ stack.transpose(1, 2)
    calls: Mapping[str, tuple[torch.Tensor, Callable[[torch.Tensor], Any]]] = {
        "svd": (stack, lambda matrix: torch.linalg.svd(matrix, full_matrices=False)),
        "eigh": (symmetric, torch.linalg.eigh),
        "product": (stack, lambda matrix: matrix @ matrix),
    }
    for name, (matrices, call) in calls.items():
        batched, single = float("inf"), float("inf")
        for _ in range(repeat):
            began = time.process_time()
            call(matrices)
            middle = time.process_time()
            for matrix in matrices:
                call(matrix)
            batched, single = (
                min(batched, middle - began),
                min(single, time.process_time() - middle),
            )
        print(
            f"{name:<8} 3 × {hidden}²: one call {batched:.2f} s of CPU, three calls {single:.2f} s,"
            f" ratio {batched / single:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
