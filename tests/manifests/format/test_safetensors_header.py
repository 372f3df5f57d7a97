from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save_file

from mmerge.manifests.errors import CheckpointError
from mmerge.manifests.format.safetensors_header import make_header, parse_header


def make_file(entries: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], begin: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, stop]}


def refused(data: bytes, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        parse_header(data, file_bytes=len(data), where="file")


def test_a_file_of_the_official_writer_is_read(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.array(7, dtype=np.int64),
        "e": np.zeros((0, 4), np.float16),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "np"})
    data = (tmp_path / "x.safetensors").read_bytes()
    specs = parse_header(data, file_bytes=len(data), where="x")
    assert set(specs) == {"a", "b", "e"}
    values = np.frombuffer(data, np.float32, count=6, offset=specs["a"].offset).reshape(
        specs["a"].shape
    )
    assert (values == tensors["a"]).all()
    assert specs["b"].shape == ()
    assert specs["b"].num_entries == 1


def test_a_header_made_before_its_data_is_read_by_the_official_reader() -> None:
    header, specs = make_header(
        [("x", "F32", (2, 2)), ("m", "U8", (8,)), ("y", "F32", ())], metadata={"note": "ü"}
    )
    data = (
        header
        + np.arange(4, dtype=np.float32).tobytes()
        + bytes(range(8))
        + np.float32(5).tobytes()
    )
    loaded = load(data)
    assert loaded["x"].tolist() == [[0, 1], [2, 3]]
    assert loaded["m"].tolist() == list(range(8))
    assert loaded["y"] == 5
    assert parse_header(data, file_bytes=len(data), where="") == {spec.name: spec for spec in specs}


def test_every_rule_of_the_format_is_checked() -> None:
    refused(b"1234", "too few")
    refused(struct.pack("<Q", 1 << 60) + b"{}", "at most 100,000,000 are allowed")
    refused(struct.pack("<Q", 100) + b"{}", "truncated")
    refused(make_file({"a": entry("F32", [2], 0, 8)}, b"1234"), "truncated")
    refused(make_file({"a": entry("F32", [1], 0, 4)}, b"12345678"), "longer than its header")
    refused(make_file({"a": entry("F32", [2], 0, 4)}, b"1234"), "takes 8 bytes, its offsets span 4")
    refused(
        make_file({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"1234"),
        "begins at byte",
    )
    refused(make_file({"a": entry("F32", [1], 4, 8)}, b"12345678"), "begins at byte")
    refused(make_file({"a": entry("F32", [-1], 0, 4)}, b"1234"), "no list of sizes")
    refused(make_file({"a": entry("F32", [1], -4, 0)}, b"1234"), "no pair of sizes")
    refused(make_file({"a": entry("X9", [1], 0, 4)}, b"1234"), "dtype 'X9'")
    refused(make_file({"a": {"dtype": "F32"}}, b""), "must hold dtype, shape and data_offsets")
    key = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    twice = b"{" + key + b"," + key + b"}"
    refused(struct.pack("<Q", len(twice)) + twice + b"1", "stands twice")
    refused(struct.pack("<Q", 5) + b'{"a":', "no valid JSON")
    refused(struct.pack("<Q", 2) + b"[]", "no JSON object")


@given(st.binary(max_size=64), st.integers(0, 300))
def test_damaged_bytes_raise_nothing_but_a_checkpoint_error(noise: bytes, at: int) -> None:
    good = make_file({"a": entry("F32", [2], 0, 8), "b": entry("U8", [3], 8, 11)}, b"x" * 11)
    data = good[:at] + noise + good[at + len(noise) :]
    try:
        specs = parse_header(data, file_bytes=len(data), where="fuzz")
    except CheckpointError:
        return
    assert all(
        8 <= spec.offset <= spec.offset + spec.num_bytes <= len(data) for spec in specs.values()
    )
