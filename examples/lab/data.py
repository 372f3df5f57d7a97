"""Pictures, sounds, films and point clouds of the digits zero to nine, drawn from a seed.

Pictures and films show real handwritten digits (scikit-learn's `load_digits`), and point clouds
are scattered over their strokes; sounds are ten "spoken" words synthesised from formants and noise.
Each of the three splits has its own handwritten digits and its own synthetic speakers, so nothing
of `test` is ever trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("light", "dark")
VOICES = ("low", "high")
DIRECTIONS = ("left", "right", "up", "down")
DEPTHS = ("flat", "deep")
NUM_LOOPS = (1, 0, 0, 0, 0, 0, 1, 0, 2, 1)

SPLITS = ("train", "validation", "test")
SPLIT_SIZES = {"train": 1297, "validation": 200, "test": 300}
NUM_SPEAKERS = {"train": 60, "validation": 15, "test": 25}

IMAGE_SIZE = 32
VIDEO_SIZE = 24
VIDEO_DIGIT_SIZE = 16
NUM_FRAMES = 3
SAMPLE_RATE = 16_000
MAX_SECONDS = 1.0
NUM_POINTS = 128

_SPLIT_SEED = 8
_SPEAKER_SEED = 15


# --- handwritten digits -------------------------------------------------------------------------


@cache
def _digits_of(split: str) -> dict[int, np.ndarray]:
    """The split's handwritten digits: for each digit an array [count, 8, 8] of values 0..1."""
    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    start = sum(SPLIT_SIZES[name] for name in SPLITS[: SPLITS.index(split)])
    chosen = order[start : start + SPLIT_SIZES[split]]
    return {d: digits.images[chosen[digits.target[chosen] == d]] / 16.0 for d in range(10)}


def _draw_strokes(digit: int, size: int, split: str, rng: np.random.Generator) -> np.ndarray:
    """One handwritten digit as an array [size, size] of stroke strength 0..1.

    Training digits are turned, scaled and shifted a little; held-out digits are left as they are.
    """
    pool = _digits_of(split)[digit]
    strokes = Image.fromarray((pool[rng.integers(len(pool))] * 255).astype(np.uint8))
    strokes = strokes.resize((size, size), Image.Resampling.BILINEAR)
    angle, zoom, shift = rng.uniform(-15, 15), rng.uniform(0.85, 1.15), rng.uniform(-1, 1, 2)
    if split == "train":
        cos, sin = np.cos(np.radians(angle)) / zoom, np.sin(np.radians(angle)) / zoom
        middle = (size - 1) / 2
        dx, dy = middle + shift * size / 16
        matrix = (cos, sin, middle - cos * dx - sin * dy, -sin, cos, middle + sin * dx - cos * dy)
        strokes = strokes.transform(
            (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
        )
    return np.asarray(strokes, dtype=np.float64) / 255


def _to_pixels(strokes: np.ndarray, ink: str, rng: np.random.Generator) -> np.ndarray:
    """Strokes [..., H, W] as grey RGB pixels of varying contrast and a little noise."""
    paper, pen = rng.uniform(0.0, 0.2), rng.uniform(0.75, 1.0)
    if ink == "dark":
        paper, pen = 1 - paper, 1 - pen
    grey = paper + (pen - paper) * strokes + rng.normal(0, 0.03, strokes.shape)
    pixels = (grey.clip(0, 1) * 255).round().astype(np.uint8)
    return np.repeat(pixels[..., None], 3, axis=-1)


def draw_image(digit: int, ink: str, *, split: str, rng: np.random.Generator) -> Image.Image:
    """A handwritten digit, 32 x 32, in light ink on dark paper or in dark ink on light paper."""
    return Image.fromarray(_to_pixels(_draw_strokes(digit, IMAGE_SIZE, split, rng), ink, rng))


def draw_video(digit: int, direction: str, *, split: str, rng: np.random.Generator) -> np.ndarray:
    """A handwritten digit, 16 x 16, moving over a 24 x 24 canvas: uint8 [frames, 24, 24, 3]."""
    size = VIDEO_DIGIT_SIZE
    room = VIDEO_SIZE - size
    strokes = _draw_strokes(digit, size, split, rng)
    step = rng.integers(3, 5)
    travel = step * (NUM_FRAMES - 1)
    start, across = rng.integers(0, room - travel + 1), rng.integers(0, room + 1)
    along = start + step * np.arange(NUM_FRAMES)
    if direction in ("left", "up"):
        along = along[::-1]
    frames = np.zeros((NUM_FRAMES, VIDEO_SIZE, VIDEO_SIZE))
    for frame, place in zip(frames, along, strict=True):
        top, left = (across, place) if direction in ("left", "right") else (place, across)
        frame[top : top + size, left : left + size] = strokes
    return _to_pixels(frames, "light", rng)


def draw_cloud(digit: int, depth: str, *, split: str, rng: np.random.Generator) -> np.ndarray:
    """Return points on a handwritten digit, flat or deep, float32 [points, 3].

    The cloud is rotated slightly about the upright axis.

    x points to the right, y up and z to the viewer; the digit is about 2 high.
    """
    size = 24
    strokes = _draw_strokes(digit, size, split, rng) ** 2
    weights = np.where(strokes > 0.1, strokes, 0).ravel()
    cells = rng.choice(size * size, size=NUM_POINTS, p=weights / weights.sum())
    rows, columns = np.divmod(cells, size)
    half = rng.uniform(0.0, 0.06) if depth == "flat" else rng.uniform(0.25, 0.45)
    within = rng.uniform(-0.5, 0.5, (2, NUM_POINTS))
    flat = np.stack([columns + within[0], size - 1 - rows + within[1]]) * (2 / size) - 1
    points = np.stack([flat[0], flat[1], rng.uniform(-half, half, NUM_POINTS)], axis=1)
    angle = rng.uniform(-0.4, 0.4)
    turn = np.array(
        [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    )
    return (points @ turn.T + rng.normal(0, 0.01, points.shape)).astype(np.float32)


# --- spoken digits ------------------------------------------------------------------------------

# phone: three formants in Hz, loudness of the voice, centre of the noise in Hz, loudness of the
# noise, length in seconds
_PHONES: dict[str, tuple[tuple[float, float, float], float, float, float, float]] = {
    "iy": ((270, 2290, 3010), 1.0, 0, 0.0, 0.16),
    "ih": ((390, 1990, 2550), 1.0, 0, 0.0, 0.10),
    "eh": ((530, 1840, 2480), 1.0, 0, 0.0, 0.11),
    "ah": ((640, 1190, 2390), 1.0, 0, 0.0, 0.14),
    "aa": ((730, 1090, 2440), 1.0, 0, 0.0, 0.12),
    "ao": ((570, 840, 2410), 1.0, 0, 0.0, 0.14),
    "uw": ((300, 870, 2240), 1.0, 0, 0.0, 0.16),
    "r": ((420, 1200, 1600), 0.7, 0, 0.0, 0.09),
    "w": ((290, 610, 2150), 0.6, 0, 0.0, 0.09),
    "n": ((250, 1400, 2200), 0.35, 0, 0.0, 0.10),
    "v": ((300, 1100, 2300), 0.30, 3500, 0.15, 0.08),
    "z": ((260, 1500, 2500), 0.25, 5500, 0.40, 0.11),
    "s": ((260, 1500, 2500), 0.0, 5800, 0.60, 0.13),
    "f": ((260, 1500, 2500), 0.0, 3200, 0.22, 0.11),
    "th": ((260, 1500, 2500), 0.0, 6800, 0.25, 0.10),
    "stop": ((400, 1500, 2500), 0.0, 0, 0.0, 0.06),
    "t": ((400, 1700, 2600), 0.0, 4500, 0.80, 0.04),
    "k": ((400, 1700, 2600), 0.0, 2200, 0.80, 0.04),
}
_SPOKEN = (
    "z ih r ao uw",
    "w ah n",
    "stop t uw",
    "th r iy",
    "f ao r",
    "f aa iy v",
    "s ih stop k s",
    "s eh v eh n",
    "eh iy stop t",
    "n aa iy n",
)
NUM_PHONES = tuple(sum(phone != "stop" for phone in word.split()) for word in _SPOKEN)
_HOP = 128
_WINDOW = 512


@dataclass(frozen=True)
class Speaker:
    """What stays the same over all that one synthetic speaker says."""

    tract: float  # scale of all formants
    formants: tuple[float, float, float]  # further scale of each formant
    pitch: float  # position within the range of the voice, 0..1
    pace: float  # scale of all lengths
    breath: float  # scale of all noises


@cache
def _speakers_of(split: str) -> tuple[Speaker, ...]:
    """The synthetic speakers of a split."""
    rng = np.random.default_rng([_SPEAKER_SEED, SPLITS.index(split)])
    return tuple(
        Speaker(
            tract=float(rng.uniform(0.88, 1.18)),
            formants=tuple(float(scale) for scale in rng.uniform(0.94, 1.06, 3)),
            pitch=float(rng.uniform()),
            pace=float(rng.uniform(0.8, 1.15)),
            breath=float(rng.uniform(0.7, 1.4)),
        )
        for _ in range(NUM_SPEAKERS[split])
    )


def _smooth(track: np.ndarray, width: int) -> np.ndarray:
    """The running mean over `width` frames."""
    return np.convolve(np.pad(track, width // 2, "edge"), np.ones(width) / width, "valid")


def draw_sound(digit: int, voice: str, *, split: str, rng: np.random.Generator) -> np.ndarray:
    """A "spoken" digit in a low or a high voice over a noisy background: float32 mono samples."""
    speaker = _speakers_of(split)[rng.integers(NUM_SPEAKERS[split])]
    phones = [_PHONES[name] for name in _SPOKEN[digit].split()]
    lengths = np.array([phone[4] for phone in phones]) * speaker.pace
    lengths = lengths * rng.uniform(0.85, 1.15, len(phones))
    pause = rng.uniform(0.02, 0.12)
    ends = pause + np.cumsum(lengths)
    seconds = min(ends[-1] + rng.uniform(0.02, 0.1), MAX_SECONDS)
    samples = int(seconds * SAMPLE_RATE)
    frames = samples // _HOP + 1
    time = np.arange(frames) * _HOP / SAMPLE_RATE

    # the targets of the phone that sounds at each frame, smoothed so that one glides to the next
    index = np.minimum(np.searchsorted(ends, time), len(phones) - 1)
    formants = np.array([phone[0] for phone in phones])[index] * speaker.tract * speaker.formants
    levels = np.array([(phone[1], phone[3] * speaker.breath) for phone in phones])[index]
    levels = levels * ((time >= pause) & (time < ends[-1]))[:, None]
    centre = np.array([phone[2] for phone in phones])[index]
    formants = np.stack([_smooth(track, 5) for track in formants.T], axis=1)
    levels = np.stack([_smooth(track, 3) for track in levels.T])

    # excitation: pulses at the pitch and white noise
    low, high = (85.0, 135.0) if voice == "low" else (185.0, 285.0)
    pitch = low + (high - low) * np.clip(speaker.pitch + rng.normal(0, 0.1), 0, 1)
    bend = np.linspace(rng.uniform(0.0, 0.08), rng.uniform(-0.08, 0.0), samples)
    phase = np.cumsum(pitch * (1 + bend) / SAMPLE_RATE)
    pulses = np.diff(np.floor(phase), prepend=0.0) * np.sqrt(SAMPLE_RATE / pitch)
    hiss = rng.normal(size=samples)

    # filter frame by frame in the frequency domain
    frequency = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    width = np.array([90.0, 120.0, 180.0])[None, :, None]
    gain = np.array([1.0, 0.6, 0.3])[None, :, None]
    peaks = gain / (1 + ((frequency[None, None, :] - formants[:, :, None]) / width) ** 2)
    tilt = 1 / (1 + (frequency / 1200) ** 2)
    voiced = (peaks.sum(1) + 0.02 * tilt) * levels[0][:, None]
    noisy = np.exp(-(((frequency[None] - centre[:, None]) / 1100) ** 2)) * levels[1][:, None] * 0.4
    window = np.hanning(_WINDOW + 1)[:-1]
    pad = _WINDOW // 2
    at = np.arange(frames)[:, None] * _HOP + np.arange(_WINDOW)[None]
    spectrum = np.fft.rfft(np.pad(pulses, pad + _HOP)[at] * window) * voiced
    spectrum += np.fft.rfft(np.pad(hiss, pad + _HOP)[at] * window) * noisy
    pieces = np.fft.irfft(spectrum, _WINDOW) * window
    sound = np.zeros(samples + 2 * (pad + _HOP))
    np.add.at(sound, at, pieces)
    sound = sound[pad + _HOP : pad + _HOP + samples]

    sound = sound / (np.abs(sound).max() + 1e-9)
    background = rng.normal(size=samples) * 10 ** (-rng.uniform(22, 40) / 20)
    sound = (sound + background) * rng.uniform(0.25, 0.8)
    return sound.clip(-1, 1).astype(np.float32)
