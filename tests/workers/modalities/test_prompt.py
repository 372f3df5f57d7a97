"""Prompts are put together as templates say, and media that cannot be read are named."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
from PIL import Image

from mmerge.manifests.errors import PromptError
from mmerge.workers.modalities.media_files import (
    _mp3_frame_bytes,
    read_array,
    read_audio,
    read_image,
    read_video,
)
from mmerge.workers.modalities.prompt import Part, arrange, check_places, make_prompt

A, B = Part("image", "a.png"), Part("audio", "b.wav")


def test_media_come_first_without_a_template() -> None:
    assert make_prompt("what ?", [A, B], template=None, media_templates={}) == [
        A,
        B,
        Part.text("what ?"),
    ]


def test_templates_surround_every_medium_and_the_question() -> None:
    found = make_prompt(
        "what ?", [A, B], template="<{media}>q {text} a", media_templates={"image": "i {media} . "}
    )
    assert found == [Part.text("<i "), A, Part.text(" . "), B, Part.text(">q what ? a")]


def test_a_question_with_places_puts_each_medium_there() -> None:
    found = make_prompt(
        "is {audio} in {image} ?", [A, B], template="{media}{text}", media_templates={}
    )
    assert found == [Part.text("is "), B, Part.text(" in "), A, Part.text(" ?")]


def test_a_medium_without_a_place_is_refused_where_others_have_one() -> None:
    with pytest.raises(PromptError, match=r"no place for 'audio'"):
        make_prompt("is {image} ?", [A, B], template=None, media_templates={})


def test_a_sound_is_resampled_and_mixed_to_one_channel(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    soundfile.write(
        tmp_path / "x.wav", np.stack([np.sin(440 * 2 * np.pi * time)] * 2, axis=1), 8000
    )
    sound = read_audio(tmp_path / "x.wav", sampling_rate=16000)
    assert sound.dtype == np.float32
    assert abs(len(sound) - 16000) <= 2
    assert np.abs(np.fft.rfft(sound[:16000])).argmax() == 440


def test_a_film_gives_its_frames_in_order(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 120, 250)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = read_video(tmp_path / "x.webp")
    assert found.shape == (3, 4, 4, 3)
    assert found[:, 0, 0, 0].tolist() == [0, 120, 250]


@pytest.mark.parametrize(
    ("read", "word"),
    [
        (read_image, "image"),
        (lambda value: read_audio(value, sampling_rate=16000), "audio"),
        (read_video, "video"),
    ],
)
def test_a_broken_or_missing_file_is_named(tmp_path: Path, read: object, word: str) -> None:
    assert callable(read)
    with pytest.raises(PromptError, match=f"nowhere.x: no such {word} file"):
        read(tmp_path / "nowhere.x")
    broken = tmp_path / "broken.x"
    broken.write_bytes(b"RIFF nonsense")
    with pytest.raises(PromptError, match=f"broken.x: cannot be read as (an? )?{word}"):
        read(broken)


def test_arrays_of_wrong_shape_are_refused() -> None:
    with pytest.raises(PromptError, match="give one channel"):
        read_audio(np.zeros((2, 100)), sampling_rate=16000)
    with pytest.raises(PromptError, match="give uint8"):
        read_video(np.zeros((2, 100)))
    with pytest.raises(PromptError, match="has no samples"):
        read_audio(np.zeros(0), sampling_rate=16000)


def test_a_truncated_audio_file_is_refused_and_one_of_unknown_length_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "cut.wav"
    soundfile.write(path, np.zeros(1600, np.float32), 16000)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        PromptError, match=r"cut.wav: is truncated: 1,\d+ bytes, its header says 3,\d+"
    ):
        read_audio(path, sampling_rate=16000)
    path.write_bytes(data[:4] + b"\xff" * 4 + data[8:])
    assert len(read_audio(path, sampling_rate=16000)) == 1600


@pytest.mark.parametrize(
    "ahead", [b"", b"ID3\x04\0\0\0\0\x01\x02" + b"\xff\xfeInfo".ljust(130, b"\xff")]
)
def test_an_mp3_that_is_cut_short_is_refused(tmp_path: Path, ahead: bytes) -> None:
    path = tmp_path / "cut.mp3"
    soundfile.write(path, np.sin(np.arange(16000) * 0.1).astype(np.float32), 16000)
    data = ahead + path.read_bytes()
    path.write_bytes(data)
    assert len(read_audio(path, sampling_rate=16000)) == 16000
    path.write_bytes(data[: len(ahead) + (len(data) - len(ahead)) // 2])
    with pytest.raises(
        PromptError, match=rf"cut.mp3: is truncated: [\d,]+ bytes, its header says {len(data):,}"
    ):
        read_audio(path, sampling_rate=16000)


def test_what_a_decoder_prints_about_a_broken_sound_is_not_added_to_the_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.mp3"
    soundfile.write(path, np.sin(np.arange(16000) * 0.1).astype(np.float32), 16000)
    path.write_bytes(path.read_bytes()[:10] + bytes(range(1, 255)) * 10)
    with pytest.raises(
        PromptError,
        match=(
            r"broken.mp3: cannot be read as audio \(no MP3 frame follows the first one, at byte"
            r" \d+\)\. Give a WAV"
        ),
    ):
        read_audio(path, sampling_rate=16000)
    assert capfd.readouterr().err == ""


def test_reading_sounds_leaves_the_stderr_of_the_process_to_other_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "noise.mp3"
    soundfile.write(path, np.sin(np.arange(16000) * 0.1).astype(np.float32), 16000)
    before = os.fstat(2).st_ino
    is_done = threading.Event()

    def write_lines() -> int:
        num_lines = 0
        while not is_done.is_set():
            os.write(2, b"line of another thread\n")
            num_lines += 1
            time.sleep(0.0001)
        return num_lines

    with ThreadPoolExecutor(4) as pool:
        written = pool.submit(write_lines)
        try:
            list(pool.map(lambda _: read_audio(path, sampling_rate=16000), range(60)))
        finally:
            is_done.set()
    assert os.fstat(2).st_ino == before
    assert capfd.readouterr().err.count("line of another thread\n") == written.result()


@pytest.mark.parametrize("rate", [8000, 12000, 16000, 22050, 44100, 48000])
def test_every_frame_of_an_mp3_ends_where_the_next_one_begins(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "tone.mp3"
    for mode in ("CONSTANT", "VARIABLE"):
        soundfile.write(
            path, np.sin(np.arange(rate) * 0.1).astype(np.float32), rate, bitrate_mode=mode
        )
        data, start = path.read_bytes(), 0
        while start < len(data):
            num_bytes = _mp3_frame_bytes(data[start : start + 4])
            assert num_bytes
            start += num_bytes
        assert start == len(data)
        assert len(read_audio(path, sampling_rate=rate)) == rate


def test_an_array_file_gives_its_numbers_in_the_order_of_this_machine(tmp_path: Path) -> None:
    expected = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save(tmp_path / "x.npy", expected.astype(">f4"))
    found = read_array(tmp_path / "x.npy", what="features", remedy="")
    assert found.dtype.isnative
    assert np.array_equal(found, expected)


def test_an_array_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.npy"
    np.save(path, np.ones((4, 3), np.float32))
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(
            PromptError, match=r"cut.npy: cannot be read as a cloud \([^\n]+\)\. Give another$"
        ):
            read_array(path, what="a cloud", remedy="Give another")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array(["a", "b"]), "its entries are <U1, no numbers"),
        (np.array([{}], dtype=object), "Object arrays cannot be loaded"),
        (np.array([1.0, np.nan]), "NaN or infinite"),
        (np.array([np.inf], np.float32), "NaN or infinite"),
    ],
)
def test_an_array_file_without_numbers_is_refused(
    tmp_path: Path, values: np.typing.NDArray[Any], reason: str
) -> None:
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(PromptError, match=f"x.npy: cannot be read as features .*{reason}"):
        read_array(tmp_path / "x.npy", what="features", remedy="")
    with pytest.raises(PromptError, match=r"nowhere.npy: no such file"):
        read_array(tmp_path / "nowhere.npy", what="features", remedy="")


def test_a_decoder_that_fails_on_a_path_is_not_said_to_need_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise TypeError("unsupported operand")

    (tmp_path / "a.png").write_bytes(b"x")
    monkeypatch.setattr("PIL.Image.open", fail)
    with pytest.raises(PromptError, match=r"a\.png: cannot be read as an image \(unsupported"):
        read_image(tmp_path / "a.png")
    with pytest.raises(PromptError, match="an image was given as int; give a path"):
        read_image(7)


def test_the_text_of_a_message_in_parts_is_taken_as_it_is() -> None:
    image, sound = Part("image", "a.png"), Part("audio", "b.wav")
    templates: Any = {"template": "<{media}|{text}>", "media_templates": {"image": "[{media}]"}}
    words = Part.text("{image} {text} what?")
    expected = [Part.text("<["), image, Part.text("]|{image} {text} what?>")]
    assert arrange([image, words], **templates) == expected
    assert arrange([words, image], **templates) == expected
    assert (
        arrange([Part.text("{image} {text}"), Part.text(" what?"), image], **templates) == expected
    )
    between = [Part.text("a"), image, Part.text("{b}"), sound]
    assert arrange(between, **templates) == between
    assert arrange([image, sound], **templates) == [
        Part.text("<["),
        image,
        Part.text("]"),
        sound,
        Part.text("|>"),
    ]


def test_a_video_without_frames_is_refused() -> None:
    with pytest.raises(PromptError, match="no frames"):
        read_video(np.zeros((0, 4, 4, 3), np.uint8))


def test_a_place_without_a_medium_is_refused() -> None:
    with pytest.raises(
        PromptError, match=r"the question names \{image\} 2 times, 1 such inputs were given"
    ):
        check_places("{image} and {image}?", [Part("image", "a.png")], kinds=["image", "audio"])
    check_places("{image} and {other}", [Part("image", "a.png")], kinds=["image", "audio"])
