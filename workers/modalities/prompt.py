"""Prompts as lists of parts: text, images, sounds, videos, read from files or given as arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests.errors import PromptError

MEDIA_PLACE = "{media}"
TEXT_PLACE = "{text}"


@dataclass(frozen=True)
class Part:
    """One part of a prompt.

    `kind` is `text`, or a modality or the name of an expert. `value` is a str for text; for images
    a path or a PIL image; for sounds a path or a mono float array at `sampling_rate`; for videos a
    path or uint8 frames [frames, height, width, 3].
    """

    kind: str
    value: Any
    sampling_rate: int | None = None

    @classmethod
    def text(cls, text: str) -> Part:
        """Return a part of plain text."""
        return cls("text", text)


def check_places(question: str, media: Sequence[Part], *, kinds: Collection[str]) -> None:
    """Raise PromptError where a question has more places for a kind of medium, such as `{image}`,
    than there are media of it.
    """
    for kind in sorted(kinds):
        wanted, given = question.count("{" + kind + "}"), sum(part.kind == kind for part in media)
        if wanted > given:
            raise PromptError(
                f"the question names {{{kind}}} {wanted} times, {given} such media were given: give"
                " one for each, or leave the place out"
            )


def make_prompt(
    question: str,
    media: Sequence[Part],
    *,
    template: str | None,
    media_templates: Mapping[str, str],
) -> list[Part]:
    """Return the parts of a prompt: the media in their order, then the question, as the templates
    say.

    Args:
        question: what is asked. Where it holds `{image}`, `{audio}`, …, that medium is put there
            instead of in front.
        media: the parts that are not text.
        template: text with the places `{media}` and `{text}`; the media come first if absent.
        media_templates: per kind, text with the place `{media}` around each medium.
    """
    parts: list[Part] = []
    if any("{" + part.kind + "}" in question for part in media):
        return _place_media(question, media)
    before, _, after = (template or f"{MEDIA_PLACE}{TEXT_PLACE}").partition(TEXT_PLACE)
    head, _, between = before.partition(MEDIA_PLACE)
    parts.append(Part.text(head))
    for part in media:
        left, _, right = media_templates.get(part.kind, MEDIA_PLACE).partition(MEDIA_PLACE)
        parts += [Part.text(left), part, Part.text(right)]
    parts.append(Part.text(between + question + after))
    return _join_texts(parts)


def _place_media(question: str, media: Sequence[Part]) -> list[Part]:
    parts: list[Part] = []
    rest = question
    waiting = list(media)
    while waiting:
        found = [(rest.find("{" + part.kind + "}"), index) for index, part in enumerate(waiting)]
        placed = [pair for pair in found if pair[0] >= 0]
        if not placed:
            raise PromptError(
                f"the question has no place for {waiting[0].kind!r}: name every medium as"
                f" {{{waiting[0].kind}}}, or none"
            )
        at, index = min(placed)
        part = waiting.pop(index)
        parts += [Part.text(rest[:at]), part]
        rest = rest[at + len(part.kind) + 2 :]
    return _join_texts([*parts, Part.text(rest)])


def _join_texts(parts: Sequence[Part]) -> list[Part]:
    joined: list[Part] = []
    for part in parts:
        if part.kind == "text" and joined and joined[-1].kind == "text":
            joined[-1] = Part.text(joined[-1].value + part.value)
        else:
            joined.append(part)
    return [part for part in joined if part.kind != "text" or part.value]


def read_array(path: str | Path, *, what: str, remedy: str) -> NDArray[Any]:
    """Return the array of numbers in an .npy file.

    Raises:
        PromptError: there is none, it is cut short, or has numbers that are NaN or infinite; calls
            it `what`, ends with `remedy`.
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
    """Return a PIL image in RGB. Raises PromptError when the file cannot be read as one."""
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


def read_sound(
    value: Any, *, sampling_rate: int, given_rate: int | None = None
) -> NDArray[np.float32]:
    """Return a sound as mono float32 at `sampling_rate` (Hz). Raises PromptError when the file
    cannot be read as one.
    """
    if isinstance(value, (str, Path)):
        import soundfile  # type: ignore[import-untyped]

        if not Path(value).is_file():
            raise PromptError(f"{value}: no such sound file")
        try:
            with _without_warnings():
                samples, given_rate = soundfile.read(value, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
            reason = (
                "the decoder finds no sound in it" if "does not exist" in str(error) else str(error)
            )  # the library's word for any MP3
            raise PromptError(
                f"{value}: cannot be read as a sound ({reason}). Give a WAV, FLAC, OGG or MP3 file"
            ) from error
        _check_whole(Path(value))
        samples = samples.mean(axis=1)
    else:
        try:
            samples = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise PromptError(
                f"a sound was given as {type(value).__name__}; give a path or a float array"
                " (samples,)"
            ) from error
        if samples.ndim != 1:
            raise PromptError(
                f"a sound has shape {samples.shape}; give one channel, shape (samples,)"
            )
    if not len(samples):
        raise PromptError(
            f"{value if isinstance(value, (str, Path)) else 'a sound'}: has no samples"
        )
    if not np.isfinite(samples).all():
        raise PromptError(
            f"{value if isinstance(value, (str, Path)) else 'a sound'}: has samples that are NaN or"
            " infinite"
        )
    if given_rate not in (None, sampling_rate):
        import soxr  # type: ignore[import-untyped]

        samples = soxr.resample(samples, given_rate, sampling_rate)
    return np.asarray(samples, dtype=np.float32)


def _check_whole(path: Path) -> None:
    """Raise PromptError for a WAV or MP3 file that is shorter than its header says: the library
    would read what is left, silently.
    """
    try:
        with path.open("rb") as file:
            head = file.read(10)
            start = (
                10 + sum(byte << 7 * (3 - place) for place, byte in enumerate(head[6:]))
                if head[:3] == b"ID3"
                else 0
            )
            file.seek(start)
            wanted = start + _mp3_bytes(file.read(64))
        size = path.stat().st_size
    except OSError as error:
        raise PromptError(f"{path}: cannot be read as a sound ({error.strerror})") from error
    is_stream = head[4:8] in (
        b"\0\0\0\0",
        b"\xff\xff\xff\xff",
    )  # written to a pipe: the length was not known
    if head[:4] == b"RIFF" and not is_stream:
        wanted = int.from_bytes(head[4:8], "little") + 8
    if wanted > size + 1:  # some writers leave the last padding byte out
        raise PromptError(
            f"{path}: is cut short: {size:,} bytes, its header says {wanted:,}. Give the whole file"
        )


def _mp3_bytes(frame: bytes) -> int:
    """Return how long an MP3 stream is by the tag that encoders write into its first frame ("Xing"
    or "Info"), 0 where there is none.
    """
    if len(frame) < 2 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return 0
    tag = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = int.from_bytes(frame[tag + 4 : tag + 8], "big")
    if tag < 0 or not flags & 2:
        return 0
    at = tag + 8 + (4 if flags & 1 else 0)  # the number of frames comes first, where it is given
    return int.from_bytes(frame[at : at + 4], "big")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep what a decoder's own code prints out of the program's output: what is wrong with the
    file is said once, by the error.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def read_video(value: Any) -> NDArray[np.uint8]:
    """Return the frames of a video, uint8 [frames, height, width, 3]. Raises PromptError when the
    file cannot be read as one.
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
