"""Read images, audio, video and arrays from files, or check them where they are given as arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests.errors import PromptError


def read_array(path: str | Path, *, what: str, remedy: str) -> NDArray[Any]:
    """Return the array in an .npy file.

    Raises:
        PromptError: the file is missing or truncated, or has no finite numbers. The message calls
            it `what` and ends with `remedy`.
    """
    try:
        with Path(path).open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
        if values.dtype.kind not in "fiu":
            raise ValueError(f"its entries are {values.dtype}, no numbers")
        if not np.isfinite(values).all():
            raise ValueError("it has numbers that are NaN or infinite")
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file. {remedy}") from None
    except (OSError, EOFError, ValueError, SyntaxError, MemoryError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PromptError(f"{path}: cannot be read as {what} ({reason}). {remedy}") from error


def read_image(value: Any) -> Any:
    """Return a PIL image in RGB. Raises PromptError where the file cannot be read."""
    from PIL import Image

    if isinstance(value, Image.Image):
        return value.convert("RGB")
    try:
        with Image.open(value) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise PromptError(f"{value}: no such image file") from None
    except (AttributeError, TypeError) as error:
        raise PromptError(
            f"an image was given as {type(value).__name__}; give a path or a PIL image"
        ) from error
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PromptError(
            f"{value}: cannot be read as an image ({error}). Give a PNG, JPEG, WebP, GIF or BMP"
            " file"
        ) from error


def read_audio(
    value: Any, *, sampling_rate: int, input_rate: int | None = None
) -> NDArray[np.float32]:
    """Return audio as mono float32 at `sampling_rate` (Hz).

    Args:
        value: a path, or samples of one channel.
        sampling_rate: of the result.
        input_rate: of samples given as an array; `sampling_rate` if absent.

    Raises:
        PromptError: the file cannot be read, or the samples are not finite numbers of one channel.
    """
    if isinstance(value, (str, Path)):
        label = str(value)
        samples, input_rate = _read_audio_file(Path(value))
    else:
        label = "the audio"
        samples = _to_samples(value)
    if not len(samples):
        raise PromptError(f"{label}: has no samples")
    if not np.isfinite(samples).all():
        raise PromptError(f"{label}: has samples that are NaN or infinite")
    if input_rate not in (None, sampling_rate):
        import soxr  # type: ignore[import-untyped]

        samples = soxr.resample(samples, input_rate, sampling_rate)
    return np.asarray(samples, dtype=np.float32)


def _read_audio_file(path: Path) -> tuple[NDArray[np.float32], int]:
    """Return the samples of a file, mean over channels, and its sampling rate."""
    import soundfile  # type: ignore[import-untyped]

    if not path.is_file():
        raise PromptError(f"{path}: no such audio file")
    try:
        with _silent_stderr():
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        reason = str(error)
        if "does not exist" in reason:  # what the library says of any MP3 that it cannot decode
            reason = "the decoder finds no audio in it"
        raise PromptError(
            f"{path}: cannot be read as audio ({reason}). Give a WAV, FLAC, OGG or MP3 file"
        ) from error
    _check_complete(path)
    return samples.mean(axis=1), int(rate)


def _to_samples(value: Any) -> NDArray[np.float32]:
    try:
        samples = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"audio was given as {type(value).__name__}; give a path or a float array (samples,)"
        ) from error
    if samples.ndim != 1:
        raise PromptError(f"audio has shape {samples.shape}; give one channel, shape (samples,)")
    return samples


def _check_complete(path: Path) -> None:
    """Raise PromptError for a WAV or MP3 file shorter than its header says.

    The decoder would silently return the samples that are there.
    """
    try:
        with path.open("rb") as file:
            head = file.read(10)
            start = 0
            if head[:3] == b"ID3":
                # Four bytes of 7 bits each, the highest first.
                start = 10 + sum(byte << 7 * (3 - index) for index, byte in enumerate(head[6:]))
            file.seek(start)
            expected = start + _mp3_bytes(file.read(64))
        size = path.stat().st_size
    except OSError as error:
        raise PromptError(f"{path}: cannot be read as audio ({error.strerror})") from error
    # A WAV written to a pipe has no length in its header.
    is_stream = head[4:8] in (b"\0\0\0\0", b"\xff\xff\xff\xff")
    if head[:4] == b"RIFF" and not is_stream:
        expected = int.from_bytes(head[4:8], "little") + 8
    if expected > size + 1:  # some writers leave out the last padding byte
        raise PromptError(
            f"{path}: is truncated: {size:,} bytes, its header says {expected:,}. Give the whole"
            " file"
        )


def _mp3_bytes(frame: bytes) -> int:
    """Return the length of an MP3 stream from the "Xing" or "Info" tag of its first frame, or 0."""
    if len(frame) < 2 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return 0
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = int.from_bytes(frame[tag + 4 : tag + 8], "big")
    if tag < 0 or not flags & 2:
        return 0
    offset = tag + 8 + (4 if flags & 1 else 0)  # after the number of frames, if it is there
    return int.from_bytes(frame[offset : offset + 4], "big")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what a decoder's C code prints to stderr: the raised error says what is wrong."""
    sys.stderr.flush()
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def read_video(value: Any) -> NDArray[np.uint8]:
    """Return the frames of a video, uint8 [frames, height, width, 3].

    Raises:
        PromptError: the file cannot be read as a video, or the array is none.
    """
    if not isinstance(value, (str, Path)):
        frames = np.asarray(value)
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise PromptError(
                f"a video has shape {frames.shape} and dtype {frames.dtype}; give uint8 (frames,"
                " height, width, 3)"
            )
        if not len(frames):
            raise PromptError("a video has no frames; give at least one")
        return frames
    from PIL import Image, ImageSequence

    if Path(value).is_dir():
        raise PromptError(f"{value}: is a folder, expected a video file")
    try:
        with Image.open(value) as image:
            return np.stack(
                [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
            )
    except FileNotFoundError:
        raise PromptError(f"{value}: no such video file") from None
    except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PromptError(
            f"{value}: cannot be read as a video ({error}). Give an animated GIF, WebP or PNG, or"
            " frames as an array"
        ) from error
