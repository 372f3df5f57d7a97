"""Read the frames of a video: animated images whole, films (MP4, WebM) by the frames asked for.

Films are decoded by PyAV, the extra `video`. Its demultiplexer and decoders are named here, since
FFmpeg would otherwise try hundreds of formats, some of which open other files or addresses.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests import limits
from mmerge.manifests.errors import PromptError
from mmerge.manifests.regular_file import open_regular_file
from mmerge.workers.modalities.image_files import describe_error, open_image, to_label

DEFAULT_FRAMES = 8
"""Frames of a film where the expert's processor does not say how many it takes."""
_MP4_MARK, _MP4_OFFSET = b"ftyp", 4
_WEBM_START = b"\x1a\x45\xdf\xa3"
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mpeg4")
_REMEDY = "Give an MP4 or WebM film, an animated GIF, WebP or PNG, or frames as an array"


@dataclass(frozen=True)
class FilmInfo:
    """What is known of a film before it is decoded."""

    num_frames: int
    frames_per_second: float
    width: int
    height: int

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.num_frames / self.frames_per_second


@dataclass(frozen=True)
class Video:
    """Frames of a video; of a film those that were asked for."""

    frames: NDArray[np.uint8]
    """[frames, height, width, 3]."""
    film: FilmInfo | None = None
    """None of animated images and arrays, whose frames are all there."""
    indices: tuple[int, ...] = ()
    """Of the frames within the film."""


FrameChoice = Callable[[FilmInfo], Sequence[int]]


def choose_evenly(film: FilmInfo, *, num_frames: int = DEFAULT_FRAMES) -> list[int]:
    """Return the indices of frames at equal distances over the whole film."""
    count = min(num_frames, film.num_frames)
    return [int(index * film.num_frames / count) for index in range(count)]


def read_video(value: Any) -> NDArray[np.uint8]:
    """Return the frames of a video, uint8 [frames, height, width, 3]; of a film 8 frames.

    Raises:
        PromptError: the file cannot be read as a video, the array is none, or it has too many
            frames or pixels.
    """
    return load_video(value, choose=choose_evenly).frames


def load_video(value: Any, *, choose: FrameChoice) -> Video:
    """Return a video given as a path or as frames.

    Args:
        value: a path, or uint8 frames [frames, height, width, 3].
        choose: returns the indices of the frames to take of a film.

    Raises:
        PromptError: as `read_video`.
    """
    if not isinstance(value, (str, Path)):
        return Video(_check_frames(value))
    container = _find_container(value)
    if container is not None:
        return _read_film(value, container, choose=choose)
    label = to_label(value)
    with open_image(value, label=label, what="a video", remedy=_REMEDY) as image:
        frames = _read_frames(image, label=label)
    if len(frames) == 1:
        raise PromptError(
            f"{label}: is a still image: it has one frame. Give it as an image, or as an array of"
            " frames if it is meant as a video"
        )
    return Video(frames)


def _check_frames(value: Any) -> NDArray[np.uint8]:
    try:
        frames = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"a video was given as {type(value).__name__}; give a path or uint8 (frames, height,"
            " width, 3)"
        ) from error
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise PromptError(
            f"a video has shape {frames.shape} and dtype {frames.dtype}; give uint8 (frames,"
            " height, width, 3)"
        )
    if not frames.size:
        raise PromptError("a video has no frames; give at least one")
    limits.VIDEO_FRAMES.check(len(frames), where="the video", error=PromptError)
    limits.VIDEO_PIXELS.check(frames.size // 3, where="the video", error=PromptError)
    return frames


def _read_frames(image: Any, *, label: str) -> NDArray[np.uint8]:
    """Return all frames, converted one by one: none is decoded beyond a limit."""
    frames: list[NDArray[np.uint8]] = []
    while True:
        limits.VIDEO_FRAMES.check(len(frames) + 1, where=label, error=PromptError)
        num_pixels = (len(frames) + 1) * image.width * image.height
        limits.VIDEO_PIXELS.check(num_pixels, where=label, error=PromptError)
        frames.append(np.asarray(image.convert("RGB")))
        try:
            image.seek(len(frames))
        except EOFError:
            break
    return np.stack(frames)


def _find_container(path: str | Path) -> str | None:
    """Return FFmpeg's name of a film's container, None for a file that is none, or is missing."""
    try:
        with open_regular_file(path) as file:
            start = file.read(16)
    except OSError:
        return None  # the reader of animated images names the reason
    if start[_MP4_OFFSET:].startswith(_MP4_MARK):
        return "mov"
    return "matroska" if start.startswith(_WEBM_START) else None


def _read_film(path: str | Path, container: str, *, choose: FrameChoice) -> Video:
    try:
        import av
    except ImportError as error:
        raise PromptError(
            f"{path}: is a film, and the package that decodes films is not installed. Install"
            " 'mmerge[video]', or give an animated GIF, WebP or PNG, or frames as an array"
        ) from error
    label = str(path)
    try:
        with open_regular_file(path) as file:
            num_bytes = file.seek(0, io.SEEK_END)
            limits.MEDIA_FILE_BYTES.check(num_bytes, where=label, error=PromptError)
            film = _measure(av, file, container, label=label)
            indices = sorted({int(index) for index in choose(film)})
            _check_choice(film, indices, label=label)
            frames = np.stack(list(_decode(av, file, container, indices=indices, label=label)))
    except PromptError:
        raise
    except Exception as error:
        raise PromptError(
            f"{label}: cannot be read as a video ({describe_error(error)}). {_REMEDY}"
        ) from error
    return Video(frames, film, tuple(indices))


def _open_film(av: Any, file: BinaryIO, container: str) -> Any:
    file.seek(0)
    # A damaged frame ends the decoding instead of being guessed from its neighbours.
    return av.open(file, mode="r", format=container, options={"err_detect": "explode"})


def _find_stream(opened: Any, *, label: str) -> Any:
    if not opened.streams.video:
        raise PromptError(f"{label}: has no video in it. {_REMEDY}")
    stream = opened.streams.video[0]
    codec = stream.codec_context
    if codec is None or codec.name not in _CODECS:
        name = "unknown" if codec is None else codec.name
        raise PromptError(
            f"{label}: its video is of the codec {name!r}; {', '.join(_CODECS[:5])} and"
            f" {_CODECS[-1]} are decoded"
        )
    if codec.width < 1 or codec.height < 1:
        raise PromptError(f"{label}: its frames have no pixels")
    limits.IMAGE_PIXELS.check(codec.width * codec.height, where=label, error=PromptError)
    aspect = max(codec.width, codec.height) / min(codec.width, codec.height)
    limits.IMAGE_ASPECT.check(aspect, where=label, error=PromptError)
    return stream


def _measure(av: Any, file: BinaryIO, container: str, *, label: str) -> FilmInfo:
    """Count the frames without decoding them: headers often lack their number, and may lie."""
    with _open_film(av, file, container) as opened:
        stream = _find_stream(opened, label=label)
        times: list[int] = []
        for packet in opened.demux(stream):
            if packet.size:
                times.append(packet.pts if packet.pts is not None else len(times))
                limits.FILM_FRAMES.check(len(times), where=label, error=PromptError)
        width, height = stream.codec_context.width, stream.codec_context.height
        if not times:
            raise PromptError(f"{label}: has no frames. {_REMEDY}")
        rate = float(stream.average_rate or 0)
        if not rate and len(times) > 1 and stream.time_base and max(times) > min(times):
            rate = (len(times) - 1) / float((max(times) - min(times)) * stream.time_base)
    return FilmInfo(len(times), rate or 1.0, width, height)


def _check_choice(film: FilmInfo, indices: Sequence[int], *, label: str) -> None:
    """Raise PromptError for frames beyond the film, or beyond what fits into memory and time."""
    if not indices or indices[0] < 0 or indices[-1] >= film.num_frames:
        raise PromptError(
            f"{label}: the expert's processor asks for the frames {list(indices)[:5]}, the film has"
            f" {film.num_frames:,}. Give frames as an array"
        )
    size = film.width * film.height
    limits.VIDEO_FRAMES.check(len(indices), where=label, error=PromptError)
    limits.VIDEO_PIXELS.check(len(indices) * size, where=label, error=PromptError)
    limits.FILM_PIXELS.check((indices[-1] + 1) * size, where=label, error=PromptError)


def _decode(
    av: Any, file: BinaryIO, container: str, *, indices: Sequence[int], label: str
) -> Iterator[NDArray[np.uint8]]:
    """Yield the frames of these indices, as they are shown: decoded from the start, turned."""
    wanted = iter(indices)
    index = next(wanted)
    with _open_film(av, file, container) as opened:
        stream = _find_stream(opened, label=label)
        size = stream.codec_context.width, stream.codec_context.height
        for number, frame in enumerate(opened.decode(stream)):
            if frame.is_corrupt:
                raise PromptError(f"{label}: frame {number} is damaged. Give the whole file")
            if (frame.width, frame.height) != size:
                raise PromptError(
                    f"{label}: frame {number} has {frame.width}×{frame.height} pixels, the first"
                    f" ones have {size[0]}×{size[1]}. Give frames as an array"
                )
            if number < index:
                continue
            yield _turn(frame.to_ndarray(format="rgb24"), frame.rotation, label=label)
            following = next(wanted, None)
            if following is None:
                return
            index = following
    raise PromptError(
        f"{label}: its frame {index} cannot be decoded, although the file lists it. Give the whole"
        " file"
    )


def _turn(pixels: NDArray[np.uint8], degrees: int, *, label: str) -> NDArray[np.uint8]:
    """Return a frame turned counter-clockwise, as players show films of telephones."""
    if degrees % 90:
        raise PromptError(f"{label}: is to be shown turned by {degrees} degrees; turn its frames")
    return np.ascontiguousarray(np.rot90(pixels, degrees // 90))
