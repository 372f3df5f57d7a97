"""Write a few held-out images, sounds and videos as files: python examples/lab/samples.py."""

from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import data

SEED = 4
IMAGES = ((0, "dark"), (3, "light"), (4, "dark"), (7, "light"))
SOUNDS = ((3, "low"), (7, "high"), (8, "low"), (9, "high"))
VIDEOS = ((2, "up"), (7, "left"))


def write_samples(folder: Path) -> None:
    """Write the samples; a file's name tells what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(SEED)
    words = data.DIGIT_WORDS
    for digit, ink in IMAGES:
        image = data.draw_image(digit, ink, split="test", rng=rng)
        image.save(folder / f"image_{words[digit]}_{ink}.png")
    for digit, voice in SOUNDS:
        sound = data.draw_sound(digit, voice, split="test", rng=rng)
        with wave.open(str(folder / f"sound_{words[digit]}_{voice}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(data.SAMPLE_RATE)
            file.writeframes((sound * 32767).round().astype("<i2").tobytes())
    for digit, direction in VIDEOS:
        video = data.draw_video(digit, direction, split="test", rng=rng)
        frames = [Image.fromarray(frame) for frame in video]
        frames[0].save(
            folder / f"video_{words[digit]}_{direction}.gif",
            save_all=True,
            append_images=frames[1:],
            duration=300,
            loop=0,
        )


if __name__ == "__main__":
    write_samples(Path(__file__).resolve().parent / "samples")
