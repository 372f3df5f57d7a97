"""Write a few held-out images, audio, videos and point clouds as files.

Usage: python examples/lab/samples.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import data, tasks
from lab.prompts import SUFFIXES, write_medium

SEED = 4
IMAGES = ((0, "dark"), (3, "light"), (4, "dark"), (7, "light"))
SOUNDS = ((3, "low"), (7, "high"), (8, "low"), (9, "high"))
VIDEOS = ((2, "up"), (7, "left"))
CLOUDS = ((3, "flat"), (8, "deep"))


def write_samples(folder: Path) -> None:
    """Write the samples; a file's name tells what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    words = data.DIGIT_WORDS
    sources = [
        *(("image", "image", digit, ink) for digit, ink in IMAGES),
        *(("audio", "sound", digit, voice) for digit, voice in SOUNDS),
        *(("video", "video", digit, direction) for digit, direction in VIDEOS),
        *(("point", "cloud", digit, depth) for digit, depth in CLOUDS),
    ]
    for modality, name, digit, attribute in sources:
        value = tasks.draw_source(
            tasks.Source(modality, digit, attribute, True), split="test", rng=rng
        )
        write_medium(
            modality, value, folder / f"{name}_{words[digit]}_{attribute}{SUFFIXES[modality]}"
        )


if __name__ == "__main__":
    write_samples(Path(__file__).resolve().parent / "samples")
