"""Hostile media, prompts and options of `mmerge generate`: each is refused with one message."""

from __future__ import annotations

import io
import json
import os
import struct
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile  # type: ignore[import-untyped]
import torch
from PIL import Image

from mmerge.manifests.errors import PromptError
from mmerge.workers.modalities.prompt import Part

SAMPLES = Path(__file__).resolve().parents[2] / "examples" / "lab" / "samples"
IMAGE = SAMPLES / "image_seven_light.png"
SOUND = SAMPLES / "sound_three_low.wav"
WIDTH = 64
"""Of the features that the connector of the lab's `point` expert takes."""


def make_png(path: Path, width: int, height: int) -> None:
    compressor = zlib.compressobj(9)
    row = b"\0" + bytes((width + 7) // 8)
    data = b"".join(compressor.compress(row) for _ in range(height)) + compressor.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def make_gif(path: Path, frames: int, width: int, height: int) -> None:
    """One full frame and then tiny ones, of which each becomes a full frame when it is read."""
    whole, tiny = io.BytesIO(), io.BytesIO()
    Image.new("P", (width, height)).save(whole, "GIF")
    Image.new("P", (1, 1)).save(tiny, "GIF")
    frame = tiny.getvalue()[tiny.getvalue().index(b",", 13) : -1]
    path.write_bytes(whole.getvalue()[:-1] + frame * frames + b";")


def make_jpeg(path: Path, scans: int) -> None:
    data = io.BytesIO()
    Image.new("L", (16, 16)).save(data, "JPEG", progressive=True)
    jpeg = data.getvalue()
    start = jpeg.rindex(b"\xff\xda")
    path.write_bytes(jpeg[:start] + jpeg[start:-2] * scans + jpeg[-2:])


def make_wav(path: Path, *, rate: int, samples: int, channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes(b"\x80" * samples * channels)


def make_flac(path: Path) -> None:
    with soundfile.SoundFile(str(path), "w", 655_350, 8, format="FLAC", subtype="PCM_16") as file:
        for _ in range(20):
            file.write(np.zeros((655_350, 8), np.int16))


def make_npy(path: Path, shape: object, *, dtype: str = "<f4", data: bytes = b"") -> None:
    header = str({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    header += b" " * ((-len(header) - 11) % 64) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)


def patch_sound(path: Path, offset: int, data: bytes) -> None:
    sound = bytearray(SOUND.read_bytes())
    sound[offset : offset + len(data)] = data
    path.write_bytes(sound)


def save_image(path: Path, kind: str, size: tuple[int, int], **options: Any) -> None:
    Image.new("L", size).save(path, kind, **options)


Maker = Callable[[Path], object]
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
MEDIA: dict[str, tuple[str, Maker, str]] = {
    "PNG of 169 megapixels": (
        "image",
        lambda p: make_png(p, 13_000, 13_000),
        "169,000,000 pixels, at most 67,108,864",
    ),
    "PNG of 900 megapixels": (
        "image",
        lambda p: make_png(p, 30_000, 30_000),
        "At most 67,108,864 pixels",
    ),
    "PNG of one line": ("image", lambda p: make_png(p, 60_000, 1), "times the height as width"),
    "PNG of one column": ("image", lambda p: make_png(p, 1, 60_000), "times the height as width"),
    "PNG cut short": (
        "image",
        lambda p: p.write_bytes(IMAGE.read_bytes()[:60]),
        "cannot be read as an image",
    ),
    "PNG of zero pixels": ("image", lambda p: make_png(p, 0, 5), ""),
    "WebP of 178 megapixels": (
        "image",
        lambda p: save_image(p, "WEBP", (16_383, 10_900), lossless=True, method=0),
        "at most 67,108,864",
    ),
    "JPEG of 500 scans": ("image", lambda p: make_jpeg(p, 500), "scans, at most 200"),
    "TIFF": ("image", lambda p: save_image(p, "TIFF", (9, 9)), "in none of the formats"),
    "ICO": ("image", lambda p: save_image(p, "ICO", (16, 16)), "in none of the formats"),
    "PPM": ("image", lambda p: save_image(p, "PPM", (9, 9)), "in none of the formats"),
    "PostScript": ("image", lambda p: p.write_bytes(POSTSCRIPT), "in none of the formats"),
    "SVG": (
        "image",
        lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "in none of the formats",
    ),
    "an image of text": ("image", lambda p: p.write_text("hello"), "in none of the formats"),
    "an empty image": ("image", lambda p: p.write_bytes(b""), "in none of the formats"),
    "an image that is a FIFO": ("image", lambda p: os.mkfifo(p), "is a FIFO"),
    "an image that is a folder": ("image", lambda p: p.mkdir(), "is a folder"),
    "an image that is a device": ("image", lambda p: p.symlink_to("/dev/zero"), "is a device"),
    "an image linked to nothing": (
        "image",
        lambda p: p.symlink_to("nothing"),
        "no such image file",
    ),
    "an image linked to itself": ("image", lambda p: p.symlink_to(p), "symbolic links"),
    "a GIF of 2000 frames": (
        "video",
        lambda p: make_gif(p, 2000, 50, 50),
        "513 frames, at most 512",
    ),
    "a GIF of large frames": (
        "video",
        lambda p: make_gif(p, 500, 2000, 2000),
        "pixels in all its frames, at most 134,217,728",
    ),
    "a GIF of 100000 frames": ("video", lambda p: make_gif(p, 100_000, 100, 100), "at most 512"),
    "a video of text": ("video", lambda p: p.write_text("hello"), "cannot be read as a video"),
    "a video that is a FIFO": ("video", lambda p: os.mkfifo(p), "is a FIFO"),
    "a video that is a folder": ("video", lambda p: p.mkdir(), "is a folder"),
    "a WAV at 1 Hz": (
        "audio",
        lambda p: make_wav(p, rate=1, samples=100_000),
        "1 Hz, expected at least 1,000",
    ),
    "a WAV at 0 Hz": ("audio", lambda p: patch_sound(p, 24, bytes(4)), "cannot be read as audio"),
    "a WAV at 4 GHz": ("audio", lambda p: patch_sound(p, 24, b"\xff" * 4), ""),
    "a WAV of two hours": (
        "audio",
        lambda p: make_wav(p, rate=1000, samples=7_200_000),
        "7,200.0 seconds of audio, at most 3,600",
    ),
    "a WAV of 40 channels": (
        "audio",
        lambda p: make_wav(p, rate=8000, samples=10, channels=40),
        "40 channels, at most 16",
    ),
    "a WAV without samples": (
        "audio",
        lambda p: make_wav(p, rate=8000, samples=0),
        "has no samples",
    ),
    "a WAV without channels": ("audio", lambda p: patch_sound(p, 22, bytes(2)), ""),
    "a FLAC at 655 kHz": ("audio", make_flac, "655,350 samples per second, at most 384,000"),
    "an AIFF": (
        "audio",
        lambda p: soundfile.write(str(p), np.zeros(9), 8000, format="AIFF"),
        "it is no WAV",
    ),
    "an AU": (
        "audio",
        lambda p: soundfile.write(str(p), np.zeros(9), 8000, format="AU"),
        "it is no WAV",
    ),
    "a WAV of NaN": (
        "audio",
        lambda p: soundfile.write(
            str(p), np.full(900, np.nan), 8000, format="WAV", subtype="FLOAT"
        ),
        "NaN or infinite",
    ),
    "a sound of text": ("audio", lambda p: p.write_text("hello"), "it is no WAV"),
    "an empty sound": ("audio", lambda p: p.write_bytes(b""), "it is no WAV"),
    "a sound that is a FIFO": ("audio", lambda p: os.mkfifo(p), "is a FIFO"),
    "a sound that is a device": ("audio", lambda p: p.symlink_to("/dev/zero"), "is a device"),
    "ID3 of 256 MiB": (
        "audio",
        lambda p: p.write_bytes(b"ID3\4\0\0\x7f\x7f\x7f\x7f"),
        "cannot be read as audio",
    ),
    "Ogg without pages": (
        "audio",
        lambda p: p.write_bytes(b"OggS" + b"\xff" * 100),
        "cannot be read as audio",
    ),
    "npy of 10^10": ("point", lambda p: make_npy(p, (10**9, 10)), "at most 33,554,432"),
    "npy of 10^18": ("point", lambda p: make_npy(p, (10**18,)), "at most 33,554,432"),
    "npy of 10^5000": ("point", lambda p: make_npy(p, (10**4000,)), ""),
    "npy without data": (
        "point",
        lambda p: make_npy(p, (10**7,)),
        "40,000,000 bytes, the file has 0",
    ),
    "npy of a negative size": ("point", lambda p: make_npy(p, (-1, 3)), "negative size"),
    "npy of text as size": ("point", lambda p: make_npy(p, ("a",)), "cannot be read as features"),
    "npy of Python objects": ("point", lambda p: make_npy(p, (1,), dtype="|O"), "Object arrays"),
    "npy of records": (
        "point",
        lambda p: make_npy(p, (1,), dtype="|V9", data=bytes(9)),
        "no numbers",
    ),
    "npy of dates": (
        "point",
        lambda p: make_npy(p, (1,), dtype="<M8[s]", data=bytes(8)),
        "no numbers",
    ),
    "npy of a lie": ("point", lambda p: make_npy(p, (9, WIDTH)), " bytes, the file has "),
    "npy that is longer": (
        "point",
        lambda p: make_npy(p, (1, WIDTH), data=bytes(4 * WIDTH + 1)),
        " bytes, the file has ",
    ),
    "npy nested deep": (
        "point",
        lambda p: p.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", 9999) + b"(" * 9998 + b"\n"),
        "cannot be read as features",
    ),
    "npy of another version": (
        "point",
        lambda p: p.write_bytes(b"\x93NUMPY\x09\0" + bytes(99)),
        "cannot be read as features",
    ),
    "npy of one axis": (
        "point",
        lambda p: np.save(p.open("wb"), np.ones(WIDTH, np.float32)),
        "features",
    ),
    "npy of integers": (
        "point",
        lambda p: np.save(p.open("wb"), np.ones((2, WIDTH), np.int32)),
        "a float array",
    ),
    "npy of 3e38": (
        "point",
        lambda p: np.save(p.open("wb"), np.full((2, WIDTH), 3e38, np.float32)),
        "point",
    ),
    "npy of 1e300": (
        "point",
        lambda p: np.save(p.open("wb"), np.full((2, WIDTH), 1e300)),
        "more than",
    ),
    "npy of NaN": (
        "point",
        lambda p: np.save(p.open("wb"), np.full((2, WIDTH), np.nan)),
        "NaN or infinite",
    ),
    "a pickle": (
        "point",
        lambda p: p.write_bytes(b"cos\nsystem\n(S'true'\ntR."),
        "cannot be read as features",
    ),
}


@pytest.mark.parametrize("name", MEDIA)
def test_a_hostile_file_is_refused(
    name: str, composite_loaded: Any, tmp_path: Path, refuse: Any
) -> None:
    kind, make, reason = MEDIA[name]
    path = tmp_path / "x"
    make(path)
    err = refuse("generate", "unused", "what ?", "--media", f"{kind}={path}")
    assert reason in " ".join(err.split()), err


LINES: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "line 2: prompt: no valid JSON"),
    "a number": ("7", "line 2: expected an object"),
    "a question of numbers": ('{"question": 7}', "line 2: expected an object"),
    "half a pair": ('{"question": "\\ud800"}', "line 2: prompt: has half of a surrogate pair"),
    "NaN": ('{"question": "x", "image": NaN}', "line 2: prompt: NaN"),
    "a key twice": ('{"question": "x", "question": "y"}', "line 2: prompt: key 'question'"),
    "deep": ("[" * 100_000, "line 2: prompt: no valid JSON"),
    "a number of 5000 digits": ('{"question": "x", "image": ' + "9" * 5000 + "}", "line 2: prompt"),
    "a file of a mapping": ('{"image": {"a": 1}}', "line 2: image: expected a file"),
    "text as modality": ('{"question": "x", "text": "y"}', "line 2: 'text' is no modality"),
    "an unknown modality": ('{"question": "x", "smell": "a"}', "line 2: no expert for modality"),
    "a missing image": ('{"question": "x", "image": "no.png"}', "line 2: "),
    "a NUL in a name": ('{"question": "x", "image": "a\\u0000b"}', "line 2: "),
    "escape codes in a name": ('{"question": "x", "image": "\\u001b[2Jb"}', "line 2: "),
    "an image that is a folder": ('{"question": "x", "image": "."}', "is a folder"),
    "a place without image": ('{"question": "{image}"}', "line 2: the question names {image}"),
    "nothing": ("{}", "line 2: has neither a question nor a file"),
    "a long question": (
        json.dumps({"question": "x" * 1_000_001}),
        "line 2: the text: has 1,0",
    ),
    "too many tokens": (json.dumps({"question": "which " * 2000}), "the model takes 512"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_hostile_line_of_prompts_is_named(
    name: str, composite_loaded: Any, tmp_path: Path, refuse: Any
) -> None:
    line, reason = LINES[name]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "which digit ?"}\n' + line + "\n")
    err = refuse("generate", "unused", "--prompts", path)
    assert reason in " ".join(err.split()), err


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: os.mkfifo(path), "is a FIFO"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8"),
        (lambda path: path.write_bytes(b""), "has no prompts"),
        (lambda path: (path.touch(), os.truncate(path, 1 << 30)), "at most 268,435,456"),
    ],
)
def test_a_prompt_file_that_is_none_is_refused(
    make: Maker, reason: str, composite_loaded: Any, tmp_path: Path, refuse: Any
) -> None:
    make(tmp_path / "p")
    assert reason in refuse("generate", "unused", "--prompts", tmp_path / "p")


@pytest.mark.parametrize(
    ("options", "code", "reason"),
    [
        (["--temperature", "nan"], 2, "temperature"),
        (["--temperature", "inf"], 1, "temperature"),
        (["--temperature", "1e-300"], 1, "temperature"),
        (["--seed", str(1 << 64), "--temperature", "1"], 1, "seed"),
        (["--seed", "-1", "--temperature", "1"], 1, "seed"),
        (["--seed", "9" * 5000, "--temperature", "1"], 2, ""),
        (["--seed", "1.5", "--temperature", "1"], 2, ""),
        (["--max-new-tokens", "0"], 2, ""),
        (["--max-new-tokens", str(10**30)], 1, "the model takes"),
        (["--media", "image"], 1, "KIND=FILE"),
        (["--media", "=x"], 1, "KIND=FILE"),
        (["--media", "\x1b[2J=x"], 1, "no expert"),
        (["--dtype", "float8"], 1, "--dtype"),
    ],
)
def test_a_hostile_option_is_refused(
    options: list[str], code: int, reason: str, composite_loaded: Any, refuse: Any
) -> None:
    assert reason in refuse("generate", "unused", "which digit ?", *options, code=code)


@pytest.mark.parametrize("text", ["a\udcffb", "x" * 1_000_001, "which " * 2000])
def test_a_hostile_question_is_refused(text: str, composite_loaded: Any, refuse: Any) -> None:
    err = refuse("generate", "unused", text)
    assert "the text" in err or "the model takes 512 together" in err


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 2.0},
        {"assistant_model": object()},
        {"prompt_lookup_num_tokens": 3},
        {"custom_generate": "evil/repo"},
        {"trust_remote_code": True},
        {"num_return_sequences": 2},
        {"max_length": 5},
        {"return_dict_in_generate": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 10**6},
        {"num_beams": 0},
        {"temperature": float("nan"), "do_sample": True},
        {"top_p": 2.0, "do_sample": True},
        {"top_k": -1, "do_sample": True},
        {"repetition_penalty": float("inf")},
        {"seed": 1 << 70, "do_sample": True},
        {"seed": -5, "do_sample": True},
        {"seed": 1.5, "do_sample": True},
        {"max_new_tokens": 2.5},
        {"tempreature": 1.0},
        {"do_sample": "false"},
        {"early_stopping": "sometimes"},
        {"max_time": 10**400},
        {"top_k": 5.0, "do_sample": True},
    ],
)
def test_an_option_that_routing_cannot_follow_is_refused_by_name(
    options: dict[str, Any], composite_loaded: Any
) -> None:
    name = next(iter(options))
    with pytest.raises(PromptError, match=name):
        composite_loaded.generate([Part.text("which ?")], **({"max_new_tokens": 2} | options))


@pytest.mark.parametrize(
    "part",
    [
        Part("point", np.full((2, WIDTH), np.nan, np.float32)),
        Part("point", np.full((2, WIDTH), np.inf)),
        Part("point", np.full((2, WIDTH), 1e300)),
        Part("point", torch.full((2, WIDTH), 3e38)),
        Part("point", torch.ones(2, WIDTH, dtype=torch.int64)),
        Part("point", np.full((2, WIDTH), "a")),
        Part("point", None),
        Part("audio", np.full(9000, 1e300)),
        Part("audio", np.full(9000, np.nan)),
        Part("audio", np.zeros((2, 9000))),
        Part("audio", np.zeros(9000), sampling_rate=0),
        Part("audio", np.zeros(9000), sampling_rate=-8000),
        Part("audio", np.zeros(9000), sampling_rate=1),
        Part("audio", np.zeros(9000), sampling_rate="x"),  # type: ignore[arg-type]
        Part("audio", "a\0b"),
        Part("audio", [["a"]]),
        Part("image", None),
        Part("image", 7),
        Part("image", Image.new("L", (60_000, 1))),
        Part("video", np.zeros((600, 2, 2, 3), np.uint8)),
        Part("video", np.zeros((2, 0, 2, 3), np.uint8)),
        Part("video", None),
        Part("text", 7),
        Part("text", "\ud800"),
        Part("ids", [10**9]),
        Part("ids", [-1]),
        Part("ids", [True]),
    ],
)
def test_a_hostile_part_of_a_prompt_is_refused(part: Part, composite_loaded: Any) -> None:
    with pytest.raises(PromptError):
        composite_loaded.generate([Part.text("which ?"), part], max_new_tokens=2)
