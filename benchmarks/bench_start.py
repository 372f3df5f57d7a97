"""Measure start-up: `mmerge --help`, and `mmerge plan` on the layout of a 70B model.

The checkpoints are sparse files with true headers: they take no room on the disk, and a plan reads
nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from checkpoints import Shape
from measure import plain_environment

from mmerge.manifests.format.safetensors_header import make_header

SHAPE_70B = Shape(hidden=8192, ffn=28_672, layers=80, heads=64, kv_heads=8)
FILE_BYTES = 5_000_000_000
REPEAT = 5


def write_headers(folder: Path, shape: Shape) -> None:
    """Write a checkpoint of this shape whose data is a hole."""
    folder.mkdir(parents=True)
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    num_bytes = 0
    for name, sizes in shape.tensors.items():
        size = 2
        for number in sizes:
            size *= number
        if num_bytes + size > FILE_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append((name, "BF16", sizes))
        num_bytes += size
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(groups, 1):
        file = folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        header, specs = make_header(tensors, metadata={"format": "pt"})
        with file.open("wb") as out:
            out.write(header)
            out.truncate(specs[-1].offset + specs[-1].num_bytes)
        weight_map |= {name: file.name for name, _, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": shape.num_bytes}, "weight_map": weight_map})
    )
    (folder / "config.json").write_text(json.dumps(shape.config))


def time_command(*arguments: str) -> float:
    """Return the seconds of the fastest of several runs of `mmerge`."""
    best = float("inf")
    for _ in range(REPEAT):
        began = time.monotonic()
        command = [sys.executable, "-m", "mmerge.pipeline.cli.main", *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=plain_environment())
        best = min(best, time.monotonic() - began)
    return best


def main() -> None:
    """Print the times."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in ("base", "expert0", "expert1", "expert2"):
            write_headers(folder / name, SHAPE_70B)
        experts = {
            f"expert{index}": {"path": f"expert{index}", "modality": "image"} for index in range(3)
        }
        recipe = {
            "name": "large",
            "base": "base",
            "experts": experts,
            "method": "mmer",
            "output": "store",
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        print(f"mmerge --help          {time_command('--help'):6.2f} s")
        print(f"mmerge plan, 70B       {time_command('plan', str(folder / 'recipe.yaml')):6.2f} s")
        print(
            "mmerge plan --json    "
            f" {time_command('plan', '--json', str(folder / 'recipe.yaml')):6.2f} s"
        )


if __name__ == "__main__":
    main()
