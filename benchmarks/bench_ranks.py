"""Measure the bytes read and the memory held by each rank of a composite model.

Ranks are started by torchrun on this machine, with gloo.

    python benchmarks/bench_ranks.py --shape 1.1b-2layers --ranks 1 2 4

Memory is the most that a process had (VmHWM) beyond what it had when the libraries were imported
and no weight was read. Beside it stands what it is meant to be near: 1/N of the weights that one
process holds, and one shard, the largest as it is stored.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_composite import ROOT, SHAPES, build

from mmerge.pipeline import load_composite
from mmerge.workers.composite.process_group import open_process_group
from mmerge.workers.reconstruction.build_reader import BuildReader

MIB = 1 << 20


def main() -> None:
    """Load with each number of ranks and print one line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1.1b-2layers")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument(
        "--load",
        nargs=2,
        metavar=("STORE", "FILE"),
        help="as one of several ranks: load, write the reports to a file",
    )
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return
    uri = build(options.folder.absolute(), options.shape)["mmer"]
    stored: Counter[str] = Counter()
    for row in BuildReader(uri).rows():
        stored[row.shard] += row.num_bytes
    shard = max(stored.values())
    weights = measure(uri, 1)["held_bytes"]
    print(
        f"stored {sum(stored.values()) / MIB:.0f} MiB, held by one process {weights / MIB:.0f} MiB,"
        f" largest shard {shard / MIB:.0f} MiB"
    )
    print(
        "ranks | read by each, MiB | peak of each, MiB | 1/N of the weights and one shard, MiB |"
        " seconds"
    )
    for num_ranks in options.ranks:
        reports = measure(uri, num_ranks)["reports"]
        read = [report["bytes_read"] / MIB for report in reports]
        peaks = [(report["peak_bytes"] - report["start_bytes"]) / MIB for report in reports]
        seconds = max(report["seconds"] for report in reports)
        print(
            f"{num_ranks} | {to_span(read)} | {to_span(peaks)} |"
            f" {(weights / num_ranks + shard) / MIB:.0f} | {seconds:.2f}"
        )


def to_span(values: list[float]) -> str:
    """Return the least and the most of some values, or the one that they are."""
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"


def measure(uri: str, num_ranks: int) -> dict[str, Any]:
    """Return the load reports of all ranks, and rank 0's bytes of the language model."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(num_ranks),
        ]
        subprocess.run([*command, __file__, "--load", uri, str(target)], check=True)
        measurement: dict[str, Any] = json.loads(target.read_text())
    return measurement


def load(uri: str, target: str) -> None:
    """Load as the rank that torchrun made of this process."""
    group = open_process_group()
    composite = load_composite(uri, group=group)
    if group.rank == 0:
        model = composite.language_model
        tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        Path(target).write_text(
            json.dumps(
                {
                    "held_bytes": held,
                    "reports": [asdict(report) for report in composite.load_reports],
                }
            )
        )
    group.close()


if __name__ == "__main__":
    main()
