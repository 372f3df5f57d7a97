"""Read images, audio, video and arrays from files, or check them where they are given as arrays."""

from __future__ import annotations

import math
import os
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests import limits
from mmerge.manifests.errors import PromptError
from mmerge.manifests.regular_file import open_regular_file
from mmerge.workers.modalities.image_files import describe_error, read_image
from mmerge.workers.modalities.video_files import read_video

__all__ = ["read_array", "read_audio", "read_image", "read_video"]

_AUDIO_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3")
"""First bytes of the formats that are read; the library would try dozens of others."""
_AUDIO_FORMATS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MPEG", "MP3")
_BLOCK_SAMPLES = 1 << 16
_MPEG1_BIT_RATES = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0)
_MPEG2_BIT_RATES = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0)
"""kbit/s of Layer III by index; 0 where a stream is of free format, or the index is reserved."""


def read_array(path: str | Path, *, what: str, remedy: str) -> NDArray[Any]:
    """Return the array in an .npy file.

    Raises:
        PromptError: the file is missing, truncated or too large, or has no finite numbers. The
            message calls it `what` and ends with `remedy`.
    """
    try:
        with open_regular_file(path) as file:
            values = _parse_array(file, label=str(path))
        if not np.isfinite(values).all():
            raise ValueError("it has numbers that are NaN or infinite")
        return values.astype(values.dtype.newbyteorder("="), copy=False)
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file. {remedy}") from None
    except PromptError:
        raise
    except Exception as error:
        raise PromptError(
            f"{path}: cannot be read as {what} ({describe_error(error)}). {remedy}"
        ) from error


def _parse_array(file: BinaryIO, *, label: str) -> NDArray[Any]:
    """Return the array of an .npy file; nothing is allocated for a header that lies."""
    readers: dict[tuple[int, int], Any] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format is not read")
    shape, is_fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded: they hold Python code")
    if dtype.kind not in "fiu":
        raise ValueError(f"its entries are {dtype}, no numbers")
    if not all(size >= 0 for size in shape):
        raise ValueError(f"its shape {shape} has a negative size")
    num_entries = math.prod(shape)
    limits.ARRAY_ENTRIES.check(num_entries, where=label, error=PromptError)
    expected = num_entries * dtype.itemsize
    num_bytes = os.fstat(file.fileno()).st_size - file.tell()
    if num_bytes != expected:
        raise ValueError(f"its shape {shape} takes {expected:,} bytes, the file has {num_bytes:,}")
    data = bytearray(file.read(expected))
    values = np.frombuffer(data, dtype)
    return values.reshape(shape, order="F" if is_fortran else "C")


def read_audio(
    value: Any, *, sampling_rate: int, input_rate: int | None = None
) -> NDArray[np.float32]:
    """Return audio as mono float32 at `sampling_rate` (Hz).

    Args:
        value: a path, or samples of one channel.
        sampling_rate: of the result.
        input_rate: of samples given as an array; `sampling_rate` if absent.

    Raises:
        PromptError: the file cannot be read, the samples are not finite numbers of one channel, or
            they exceed a limit.
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
    input_rate = sampling_rate if input_rate is None else input_rate
    _check_length(label, num_samples=len(samples), rate=input_rate)
    if input_rate != sampling_rate:
        import soxr  # type: ignore[import-untyped]

        samples = soxr.resample(samples, input_rate, sampling_rate)
        if not np.isfinite(samples).all():
            raise PromptError(f"{label}: its samples overflow when they are resampled")
    return np.asarray(samples, dtype=np.float32)


def _check_length(label: str, *, num_samples: int, rate: Any) -> None:
    """Raise PromptError for a sampling rate, or a number of samples, out of bounds."""
    is_number = isinstance(rate, Real) and not isinstance(rate, bool)
    if not is_number or not rate >= limits.MIN_AUDIO_RATE:
        raise PromptError(
            f"{label}: has a sampling rate of {rate!r} Hz, expected at least"
            f" {limits.MIN_AUDIO_RATE:,} Hz"
        )
    limits.AUDIO_RATE.check(rate, where=label, error=PromptError)
    limits.AUDIO_SAMPLES.check(num_samples, where=label, error=PromptError)
    limits.AUDIO_SECONDS.check(num_samples / rate, where=label, error=PromptError)


def _read_audio_file(path: Path) -> tuple[NDArray[np.float32], int]:
    """Return the samples of a file, mean over channels, and its sampling rate."""
    try:
        with open_regular_file(path) as file:
            samples, rate = _decode_audio(file.fileno(), label=str(path))
            _check_complete(file.fileno(), label=str(path))
    except PromptError:
        raise
    except FileNotFoundError:
        raise PromptError(f"{path}: no such audio file") from None
    except Exception as error:
        reason = describe_error(error)
        if "does not exist" in reason:  # what the library says of any MP3 that it cannot decode
            reason = "the decoder finds no audio in it"
        raise PromptError(
            f"{path}: cannot be read as audio ({reason}). Give a WAV, FLAC, OGG or MP3 file"
        ) from error
    return samples, rate


def _decode_audio(descriptor: int, *, label: str) -> tuple[NDArray[np.float32], int]:
    """Return the mean over the channels of an open file, and its rate; stops at the limits."""
    import soundfile  # type: ignore[import-untyped]

    num_bytes = os.fstat(descriptor).st_size
    limits.MEDIA_FILE_BYTES.check(num_bytes, where=label, error=PromptError)
    head = os.pread(descriptor, 4, 0)
    is_mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    if not head.startswith(_AUDIO_STARTS) and not is_mpeg:
        raise ValueError("it is no WAV, FLAC, OGG or MP3 file")
    _check_mp3_start(descriptor)
    with soundfile.SoundFile(descriptor, closefd=False) as sound:
        if sound.format not in _AUDIO_FORMATS:
            raise ValueError(f"its format is {sound.format}")
        limits.AUDIO_CHANNELS.check(sound.channels, where=label, error=PromptError)
        # A file of unknown length announces more samples than any file can have.
        is_announced = sound.frames < 1 << 62
        announced = sound.frames if is_announced else 0
        _check_length(label, num_samples=announced, rate=sound.samplerate)
        blocks: list[NDArray[np.float32]] = []
        num_samples = 0
        while len(block := sound.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
            num_samples += len(block)
            _check_length(label, num_samples=num_samples, rate=sound.samplerate)
            blocks.append(block.mean(axis=1))
        rate = int(sound.samplerate)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def _to_samples(value: Any) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # what overflows is infinite, and refused
            samples = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise PromptError(
            f"audio was given as {type(value).__name__}; give a path or a float array (samples,)"
        ) from error
    if samples.ndim != 1:
        raise PromptError(f"audio has shape {samples.shape}; give one channel, shape (samples,)")
    return samples


def _check_complete(descriptor: int, *, label: str) -> None:
    """Raise PromptError for a WAV or MP3 file shorter than its header says.

    The decoder would silently return the samples that are there.
    """
    head = os.pread(descriptor, 10, 0)
    start = 0
    if head[:3] == b"ID3":
        # Four bytes of 7 bits each, the highest first.
        start = 10 + sum(byte << 7 * (3 - index) for index, byte in enumerate(head[6:]))
    expected = start + _mp3_bytes(os.pread(descriptor, 64, start))
    size = os.fstat(descriptor).st_size
    # A WAV written to a pipe has no length in its header.
    is_stream = head[4:8] in (b"\0\0\0\0", b"\xff\xff\xff\xff")
    if head[:4] == b"RIFF" and not is_stream:
        expected = int.from_bytes(head[4:8], "little") + 8
    if expected > size + 1:  # some writers leave out the last padding byte
        raise PromptError(
            f"{label}: is truncated: {size:,} bytes, its header says {expected:,}. Give the whole"
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


def _check_mp3_start(descriptor: int) -> None:
    """Raise ValueError where a file that begins as an MP3 has no second frame after the first.

    Its decoder would search the rest of the file for frames and print what it meets to stderr,
    which belongs to the whole process and cannot be silenced for one thread.
    """
    num_bytes = _mp3_frame_bytes(os.pread(descriptor, 4, 0))
    following = os.pread(descriptor, 4, num_bytes)
    is_end = len(following) < 4 or following[:3] in (b"TAG", b"APE", b"LYR")  # tags at the end
    if num_bytes and not is_end and not _mp3_frame_bytes(following):
        raise ValueError(f"no MP3 frame follows the first one, at byte {num_bytes:,}")


def _mp3_frame_bytes(header: bytes) -> int:
    """Return the length of an MP3 frame from its header of 4 bytes, or 0 where it does not say.

    ISO/IEC 11172-3, 2.4.1.3 and 13818-3 (the halved sampling rates), Layer III.
    """
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0
    version = header[1] >> 3 & 3  # 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    rate_index = header[2] >> 2 & 3
    if version == 1 or rate_index == 3:
        return 0
    bit_rate = (_MPEG1_BIT_RATES if version == 3 else _MPEG2_BIT_RATES)[header[2] >> 4]
    if not bit_rate:
        return 0
    sampling_rate = (44_100, 48_000, 32_000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    padding = header[2] >> 1 & 1
    return (144 if version == 3 else 72) * bit_rate * 1000 // sampling_rate + padding
