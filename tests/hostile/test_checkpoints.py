"""Hostile checkpoints and adapters: each is refused with one message when a plan is made."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

RECIPE = (
    "name: x\nbase: base\nmethod: mmer\noutput: store\nexperts:\n"
    "  image: {path: image, modality: image}\n  audio: {path: audio, modality: audio}\n"
)


def to_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "not UTF-8": b'{"a": "\xff"}',
    "half a pair": b'{"model_type": "\\ud800"}',
    "NaN": b'{"a": NaN}',
    "a key twice": b'{"a": 1, "a": 2}',
    "a huge integer": b'{"num_hidden_layers": ' + b"9" * 5000 + b"}",
}
HEADERS: dict[str, bytes] = {
    "empty": b"",
    "four bytes": b"\0\0\0\0",
    "a header of 16 EiB": b"\xff" * 8 + b"{}",
    "a header beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "deep JSON": to_file(b"[" * 100_000),
    "a list": to_file([]),
    "half a pair": to_file(
        b'{"\\ud800": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"
    ),
    "a huge shape": to_file({"a": entry(shape=[1 << 61, 1 << 61])}, b"1234"),
    "a negative shape": to_file({"a": entry(shape=[-1])}, b"1234"),
    "a boolean shape": to_file({"a": entry(shape=[True])}, b"1234"),
    "a shape of text": to_file({"a": entry(shape=["1"])}, b"1234"),
    "an unknown dtype": to_file({"a": entry(dtype="F99")}, b"1234"),
    "a dtype of a list": to_file({"a": entry(dtype=["F32"])}, b"1234"),
    "offsets beyond the end": to_file({"a": entry(data_offsets=[0, 1 << 60])}, b"1234"),
    "overlapping tensors": to_file({"a": entry(), "b": entry()}, b"1234"),
    "a gap": to_file({"a": entry(data_offsets=[4, 8])}, b"12345678"),
    "escape codes in a name": to_file({"\x1b[2Jmodel": entry(dtype="F99")}, b"1234"),
    "markup in a name": to_file({"[bold red]x[/y]": entry(dtype="F99")}, b"1234"),
    "a direction mark in a name": to_file({"a\u202eb": entry(dtype="F99")}, b"1234"),
    "a layer of 5000 digits": to_file({f"model.layers.{'9' * 5000}.x": entry()}, b"1234"),
    "a name of half a megabyte": to_file({"x" * 500_000: entry(dtype="F99")}, b"1234"),
    "HTML": b"<html>" * 100,
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("owner", ["base", "image"])
def test_a_hostile_configuration_is_refused(
    owner: str, name: str, folder: Path, refuse: Any
) -> None:
    (folder / owner / "config.json").write_bytes(CONFIGS[name])
    (folder / "r.yaml").write_text(RECIPE)
    assert "config.json" in refuse("plan", folder / "r.yaml")


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_weight_file_is_refused(name: str, folder: Path, refuse: Any) -> None:
    (folder / "image" / "model.safetensors").write_bytes(HEADERS[name])
    (folder / "r.yaml").write_text(RECIPE)
    refuse("plan", folder / "r.yaml")


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, Callable[[Path], object]] = {
    "weights that are a FIFO": lambda path: fifo(path / "model.safetensors"),
    "a configuration that is a FIFO": lambda path: fifo(path / "config.json"),
    "weights that are a device": lambda path: link(path / "model.safetensors", "/dev/zero"),
    "weights outside the folder": lambda path: link(path / "model.safetensors", "/etc/passwd"),
    "a link to nothing": lambda path: link(path / "model.safetensors", "nothing"),
    "a link to itself": lambda path: link(path / "config.json", "config.json"),
    "weights that are a folder": lambda path: make_folder(path / "model.safetensors"),
    "a configuration that is a folder": lambda path: make_folder(path / "config.json"),
    "a tokenizer that is a FIFO": lambda path: os.mkfifo(path / "tokenizer.json"),
    "a huge small file": lambda path: os.truncate(_touch(path / "vocab.json"), 1 << 30),
    "many small files": lambda path: [_touch(path / f"{index}.txt") for index in range(1001)],
    "large small files": lambda path: [
        os.truncate(_touch(path / f"{index}.txt"), 60 << 20) for index in range(5)
    ],
    "a small file that is not UTF-8": lambda path: _touch(
        Path(os.fsdecode(bytes(path) + b"/\xff.json"))
    ),
    "an index of lists": lambda path: (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": ["b"]}}'
    ),
    "an index outside": lambda path: (path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../../etc/passwd"}}'
    ),
    "an index that is deep": lambda path: (path / "model.safetensors.index.json").write_text(
        "[" * 100_000
    ),
}


def _touch(path: Path) -> Path:
    path.touch()
    return path


@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_folder_is_refused(name: str, folder: Path, refuse: Any) -> None:
    CHANGES[name](folder / "image")
    (folder / "r.yaml").write_text(RECIPE)
    refuse("run", folder / "r.yaml", "--executor", "serial")


MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def write_adapter(path: Path, config: dict[str, Any], *, weights: bytes | None = None) -> None:
    shutil.rmtree(path)
    path.mkdir()
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(plain | config))
    if weights is not None:
        (path / "adapter_model.bin").write_bytes(weights)
        return
    factors = {
        f"{MODULE}.lora_A.weight": torch.ones(2, 16),
        f"{MODULE}.lora_B.weight": torch.ones(16, 2),
    }
    save_file(factors, path / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*a)*b", "((x|x)*)*y", "(?:a|a)*$", "x" * 5000, r"(\w+\.?)*!"],
)
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_a_costly_pattern_of_an_adapter_is_refused(
    key: str, pattern: str, folder: Path, refuse: Any
) -> None:
    write_adapter(folder / "image", {key: {pattern: 2}})
    (folder / "r.yaml").write_text(RECIPE)
    refuse("plan", folder / "r.yaml")


def make_archive(*, compression: int, size: int = 100, times: int = 1) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for _ in range(times):
            archive.writestr("archive/data.pkl", b"\0" * size)
    return data.getvalue()


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize(
    "weights",
    [
        make_archive(compression=zipfile.ZIP_DEFLATED, size=64 << 20),
        make_archive(compression=zipfile.ZIP_STORED),
        make_archive(compression=zipfile.ZIP_STORED, times=2),
        pickle.dumps(_Evil()),
        b"",
        b"PK\5\6" + b"\0" * 18,
        b"not an archive",
    ],
    ids=["bomb", "rubbish", "twice", "code", "empty", "empty archive", "text"],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_archive_of_an_adapter_is_refused(
    weights: bytes, folder: Path, refuse: Any
) -> None:
    write_adapter(folder / "image", {}, weights=weights)
    (folder / "r.yaml").write_text(RECIPE)
    refuse("plan", folder / "r.yaml")
