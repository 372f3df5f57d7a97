"""Write held-out prompts as files.

Usage: python examples/lab/prompts.py --out DIR [--split test] [--seed 7] [--examples 200].

DIR/NAME.jsonl has one prompt per line: id, task, parts ({"text": ...}, or a modality and a file
below DIR), answer and options. NAME is `text`, a modality, a modality's new task (`image_new`), a
set of modalities (`image+audio`), or such a set with `_share`.
"""

from __future__ import annotations

import argparse
import json
import sys
import wave
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import data, tasks

SUFFIXES = {"image": ".png", "audio": ".wav", "video": ".gif", "point": ".npy"}


def write_medium(kind: str, value: Any, path: Path) -> None:
    """Write an image as PNG, audio as 16-bit WAV, a video as GIF, a point cloud as NPY."""
    if kind == "image":
        value.save(path)
    elif kind == "audio":
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(data.SAMPLE_RATE)
            file.writeframes((value * 32767).round().astype("<i2").tobytes())
    elif kind == "video":
        frames = [Image.fromarray(frame) for frame in value]
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=300, loop=0)
    else:
        np.save(path, value)


def write_prompts(folder: Path, name: str, examples: Sequence[tasks.Example]) -> Path:
    """Write examples to `folder/name.jsonl` and inputs to `folder/media`; return the file."""
    media = folder / "media"
    media.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, example in enumerate(examples):
        parts = []
        for place, part in enumerate(example.parts):
            if part.kind == "text":
                parts.append({"text": part.value})
                continue
            file = media / f"{name}_{index}_{place}{SUFFIXES[part.kind]}"
            write_medium(part.kind, part.value, file)
            parts.append({part.kind: str(file.relative_to(folder))})
        row = {
            "id": f"{name}_{index}",
            "task": example.task,
            "parts": parts,
            "answer": example.answer,
            "options": list(example.options),
        }
        lines.append(json.dumps(row) + "\n")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(lines))
    return path


def make_all(*, split: str, num_examples: int, seed: int) -> dict[str, list[tasks.Example]]:
    """All sets of prompts by name, each of `num_examples`."""
    common: Any = {"split": split, "num_examples": num_examples, "seed": seed}
    sets = {
        modality: tasks.make_examples(modality, **common)
        for modality in ("text", *tasks.MODALITIES)
    }
    for modality, kind in tasks.NEW_QUESTIONS.items():
        sets[f"{modality}_new"] = tasks.make_examples(modality, **common, kinds=[kind])
    for count in range(2, len(tasks.MODALITIES) + 1):
        for chosen in combinations(tasks.MODALITIES, count):
            sets["+".join(chosen)] = tasks.make_mixed_examples(chosen, **common)
            sets["+".join(chosen) + "_share"] = tasks.make_mixed_examples(
                chosen, **common, kinds=[tasks.SHARE]
            )
    return sets


def main() -> None:
    """Write all sets."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", choices=data.SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--examples", type=int, default=200, help="prompts per set")
    args = parser.parse_args()
    for name, examples in make_all(
        split=args.split, num_examples=args.examples, seed=args.seed
    ).items():
        print(write_prompts(args.out, name, examples))


if __name__ == "__main__":
    main()
