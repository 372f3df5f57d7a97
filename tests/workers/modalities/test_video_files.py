"""Films: frames by their index, within bounds, and nothing but the formats that are named."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmerge.manifests.errors import PromptError
from mmerge.workers.modalities.video_files import (
    FilmInfo,
    choose_evenly,
    load_video,
    read_video,
)

av = pytest.importorskip("av")
NUM_FRAMES = 20


def write_film(
    path: Path,
    codec: str = "libx264",
    *,
    num_frames: int = NUM_FRAMES,
    width: int = 64,
    container: str | None = None,
) -> Path:
    """Write frames of one grey each, ten levels brighter from frame to frame."""
    with av.open(str(path), "w", format=container) as film:
        stream = film.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, 48, "yuv420p"
        for index in range(num_frames):
            pixels = np.full((48, width, 3), 10 * index % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("b.mp4", "mpeg4")]
)
def test_the_frames_asked_for_are_those_of_the_film(name: str, codec: str, tmp_path: Path) -> None:
    seen: list[FilmInfo] = []

    def choose(film: FilmInfo) -> list[int]:
        seen.append(film)
        return [0, 7, 19]

    video = load_video(write_film(tmp_path / name, codec), choose=choose)
    assert seen == [FilmInfo(NUM_FRAMES, 10.0, 64, 48)]
    assert seen[0].seconds == 2.0
    assert (video.film, video.indices) == (seen[0], (0, 7, 19))
    assert video.frames.shape == (3, 48, 64, 3)
    assert np.abs(video.frames.mean((1, 2, 3)) - [0, 70, 190]).max() < 4


def test_without_a_processors_wish_eight_frames_are_taken_evenly(tmp_path: Path) -> None:
    frames = read_video(write_film(tmp_path / "a.mp4"))
    assert np.abs(frames.mean((1, 2, 3)) / 10 - [0, 2, 5, 7, 10, 12, 15, 17]).max() < 0.5
    assert len(read_video(write_film(tmp_path / "short.mp4", num_frames=3))) == 3
    assert choose_evenly(FilmInfo(5, 1.0, 2, 2), num_frames=5) == [0, 1, 2, 3, 4]


def test_a_still_image_is_no_video(tmp_path: Path) -> None:
    for name in ("a.png", "a.gif", "a.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(PromptError, match=f"{name}: is a still image"):
            read_video(tmp_path / name)
    assert len(read_video(np.zeros((1, 8, 8, 3), np.uint8))) == 1  # meant as a video


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MMERGE_MAX_FILM_FRAMES", "19", "20 frames, at most 19"),
        ("MMERGE_MAX_VIDEO_FRAMES", "7", "8 frames, at most 7"),
        ("MMERGE_MAX_VIDEO_PIXELS", "24000", "24,576 pixels in all its frames"),
        ("MMERGE_MAX_FILM_PIXELS", "50000", "55,296 pixels to decode"),
        ("MMERGE_MAX_IMAGE_PIXELS", "3000", "3,072 pixels"),
        ("MMERGE_MAX_MEDIA_FILE_BYTES", "100", "bytes, at most 100"),
        ("MMERGE_MAX_IMAGE_ASPECT", "1", "times the height"),
    ],
)
def test_a_film_beyond_a_limit_is_refused(
    variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(PromptError, match=message) as error:
        read_video(write_film(tmp_path / "a.mp4"))
    assert variable in str(error.value)


def test_frames_beyond_the_film_are_refused(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.mp4")
    for indices in ([], [20], [-1]):
        with pytest.raises(PromptError, match="the film has 20"):
            load_video(path, choose=lambda film, indices=indices: indices)


def test_damaged_films_are_refused(tmp_path: Path) -> None:
    for name, codec in (("a.mp4", "mpeg4"), ("a.webm", "libvpx-vp9")):
        data = write_film(tmp_path / name, codec).read_bytes()
        generator = np.random.default_rng(1)
        for number in range(40):
            damaged = bytearray(data)
            start = int(generator.integers(len(data) - 64))
            damaged[start : start + 64] = generator.bytes(64)
            path = tmp_path / f"{number}-{name}"
            path.write_bytes(damaged[: int(generator.integers(16, len(data)))])
            try:  # a container may lose what no frame needs; nothing else may come out
                frames = read_video(path)
            except PromptError:
                continue
            assert frames.shape[1:] == (48, 64, 3)


def test_other_containers_and_codecs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"x.mp4: cannot be read as a video"):
        read_video(write_film(tmp_path / "x.mp4", "mpeg4", container="avi"))
    playlist = tmp_path / "list.mp4"
    playlist.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")
    with pytest.raises(PromptError, match=r"list.mp4: cannot be read as a video"):
        read_video(playlist)
    motion_jpeg = write_motion_jpeg(tmp_path / "y.mp4")
    with pytest.raises(PromptError, match="of the codec 'mjpeg'; h264"):
        read_video(motion_jpeg)
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as film:
        voice = film.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        film.mux(voice.encode(frame))
        film.mux(voice.encode())
    with pytest.raises(PromptError, match="has no video in it"):
        read_video(sound)


def write_motion_jpeg(path: Path) -> Path:
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mjpeg", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        film.mux(stream.encode(frame))
        film.mux(stream.encode())
    return path


def test_a_film_is_shown_as_players_turn_it(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = 250  # bright on the left
        for _ in range(2):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        film.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    unity = b"\0\1\0\0" + bytes(12) + b"\0\1\0\0" + bytes(12) + b"\x40\0\0\0"
    assert data[matrix : matrix + 36] == unity
    # Clockwise by 90 degrees, as telephones held upright write it: a, b, c, d = 0, 1, -1, 0.
    turned = bytes(4) + b"\0\1\0\0" + bytes(4) + b"\xff\xff\0\0" + bytes(16) + b"\x40\0\0\0"
    data[matrix : matrix + 36] = turned
    path.write_bytes(data)
    frames = read_video(path)
    assert frames.shape == (2, 64, 48, 3)
    assert frames[0, :30].mean() > 200 > 50 > frames[0, 34:].mean()  # bright at the top


def test_the_extra_is_named_where_the_decoder_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_film(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PromptError, match=r"Install 'mmerge\[video\]'"):
        read_video(path)


class Processor:
    """Takes one frame in four, as processors that sample by themselves do."""

    do_sample_frames = True
    fps = 2.5

    def sample_frames(self, metadata: Any, fps: float | None = None) -> Any:
        step = int(metadata.fps / fps)
        return np.arange(0, metadata.total_num_frames, step)


def test_a_processor_that_samples_chooses_the_frames(tmp_path: Path) -> None:
    from mmerge.workers.modalities.processor_inputs import ProcessorInputs, _describe_frames

    inputs = object.__new__(ProcessorInputs)
    inputs.processor = type("All", (), {"video_processor": Processor()})()
    video = load_video(write_film(tmp_path / "a.mp4"), choose=inputs.choose_frames)
    assert video.indices == (0, 4, 8, 12, 16)
    described = _describe_frames(video)
    assert described["do_sample_frames"] is False
    assert described["video_metadata"][0]["frames_indices"] == [0, 4, 8, 12, 16]
    assert _describe_frames(load_video(np.zeros((2, 4, 4, 3), np.uint8), choose=None)) == {}
