"""Measure the peak memory of builds, all processes together.

Shapes: a model, one with four times the layers, one with a tensor of 4 GB.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --shapes one-tensor --methods mmer_model

Three experts; of the larger shapes one is written and stands for all three, to save the disk. Their
files are removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from bench_build import OURS, ROOT, run_ours
from checkpoints import SHAPES, make_checkpoints

REFERENCE = "1.1b"
NUM_EXPERTS = 3


def main() -> None:
    """Run the benchmark and print a row per shape and method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=[REFERENCE, "4.1b", "one-tensor"]
    )
    parser.add_argument("--methods", nargs="*", choices=OURS, default=["ties", "mmer_model", "sce"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench-memory.json")
    options = parser.parse_args()
    rows = []
    first: dict[str, int] = {}
    for name in options.shapes:
        folder = ROOT / "build" / "bench" / name
        paths = _make_inputs(folder / "inputs", name)
        for method in options.methods:
            measured = run_ours(method, paths, folder)
            first.setdefault(method, measured.peak_bytes)
            rows.append(
                {
                    "shape": name,
                    "method": method,
                    "peak_bytes": measured.peak_bytes,
                    "peak_private_bytes": measured.peak_private_bytes,
                }
            )
            share = measured.peak_bytes / first[method]
            peak, private = measured.peak_bytes / 1e6, measured.peak_private_bytes / 1e6
            sizes = f"{peak:6.0f} MB  ({private:5.0f} private)"
            print(
                f"{name:<12} {method:<12} {sizes}  {share:5.2f} x the first shape "
                f" {measured.wall_s:7.1f} s",
                flush=True,
            )
        if name != REFERENCE:
            shutil.rmtree(folder)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2))


def _make_inputs(folder: Path, name: str) -> list[Path]:
    if name == REFERENCE:
        return make_checkpoints(folder, SHAPES[name], num_experts=NUM_EXPERTS)
    base, first = make_checkpoints(folder, SHAPES[name], num_experts=1)
    others = [folder / f"expert{index}" for index in range(1, NUM_EXPERTS)]
    for expert in others:
        # Hard links in separate folders: one folder under several names would count as the
        # same expert.
        expert.mkdir(exist_ok=True)
        for file in first.iterdir():
            if not (expert / file.name).exists():
                os.link(file, expert / file.name)
    return [base, first, *others]


if __name__ == "__main__":
    main()
