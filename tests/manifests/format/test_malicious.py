"""Malicious checkpoints and links: refused by a clear error, and with little memory."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmerge.manifests.errors import CheckpointError, MmergeError, StoreError
from mmerge.manifests.stores.open import open_store
from mmerge.workers.checkpoints.checkpoint import Checkpoint

BUILD = "a" * 64


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def header(entries: dict[str, Any], *, length: int | None = None, data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, stop: int, shape: list[int] | None = None) -> dict[str, Any]:
    return {
        "dtype": "U8",
        "shape": [stop - begin] if shape is None else shape,
        "data_offsets": [begin, stop],
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(**files: bytes) -> Checkpoint:
        folder = tmp_path / "model"
        folder.mkdir()
        for name, data in ({"config__json": b"{}"} | files).items():
            (folder / name.replace("__", ".")).write_bytes(data)
        return Checkpoint(str(folder), owner="expert 'image'")

    return make


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (header({}, length=1 << 60), "announces a header of 1,152,921,504,606,846,976 bytes"),
        (header({"a": entry(0, 4), "b": entry(2, 6)}, data=b"123456"), "b: data begins at byte"),
        (
            header({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, data=b"1234"),
            "no pair of sizes",
        ),
        (
            header(
                {"a": {"dtype": "U8", "shape": [1 << 61, 8], "data_offsets": [0, 4]}}, data=b"1234"
            ),
            "its offsets span 4",
        ),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "NaN is no JSON number"),
        (struct.pack("<Q", 15) + b'{"a":1,"a":2}  ', "stands twice"),
        (struct.pack("<Q", 90_000) + b"[" * 90_000, "no valid JSON"),
    ],
)
def test_a_safetensors_file_that_lies_is_refused(
    checkpoint: Callable[..., Checkpoint], data: bytes, match: str
) -> None:
    opened = checkpoint(model__safetensors=data)
    with pytest.raises(CheckpointError, match=match) as caught:
        _ = opened.tensors
    assert "expert 'image'" in str(caught.value)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "", ".."]
)
def test_a_weight_map_cannot_name_a_file_elsewhere(
    checkpoint: Callable[..., Checkpoint], place: str
) -> None:
    index = json.dumps({"weight_map": {"a": place}}).encode()
    opened = checkpoint(**{"model__safetensors__index__json": index})
    with pytest.raises(CheckpointError, match="only files in the same folder are read"):
        _ = opened.tensors


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_json_of_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 30)
    before = peak_bytes()
    with pytest.raises(CheckpointError, match="1,073,741,824 bytes, at most"):
        _ = Checkpoint(str(tmp_path), owner="base").tensors
    assert peak_bytes() - before < 100 << 20


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": NaN}',
        b'{"a": 1, "a": 2}',
        b"[1]",
        b"\xff",
        b'{"a": 1' + b"0" * 5000 + b"}",
    ],
)
def test_a_configuration_that_is_no_strict_json_is_refused(
    checkpoint: Callable[..., Checkpoint], data: bytes
) -> None:
    with pytest.raises(CheckpointError, match="Fetch the checkpoint again"):
        checkpoint(config__json=data)


def test_a_link_into_an_allowed_folder_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model", "disk", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "disk" / "config.json").write_text("{}")
    (tmp_path / "elsewhere" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "disk" / "config.json")
    (tmp_path / "model" / "tokenizer.json").symlink_to(tmp_path / "elsewhere" / "tokenizer.json")
    monkeypatch.setenv("MMERGE_LINK_ROOTS", str(tmp_path / "disk"))
    checkpoint = Checkpoint(str(tmp_path / "model"), owner="base")
    with pytest.raises(MmergeError, match=r"tokenizer\.json is a link"):
        checkpoint.read_small_files()


def test_a_link_out_of_a_checkpoint_is_refused_and_one_of_the_hubs_cache_is_not(
    tmp_path: Path,
) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "x"}')
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link that leads out of the folder"):
        Checkpoint(str(folder), owner="base")
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(secret)
    with pytest.raises(MmergeError, match="leads out of the folder"):
        Checkpoint(str(folder), owner="base").read_small_files()
    cache = tmp_path / "models--org--x"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "abc").write_text('{"model_type": "llama"}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert Checkpoint(str(snapshot), owner="base").config == {"model_type": "llama"}
    (snapshot / "tokenizer.json").symlink_to("../../../secret.json")
    with pytest.raises(MmergeError, match="leads out of the folder"):
        Checkpoint(str(snapshot), owner="base").read_small_files()


def test_a_link_out_of_a_store_is_neither_read_nor_written_nor_deleted_through(
    tmp_path: Path,
) -> None:
    outside, inside = tmp_path / "outside", tmp_path / "store"
    outside.mkdir()
    inside.mkdir()
    (outside / "secret").write_text("secret")
    (inside / "objects").symlink_to(outside)
    store = open_store(str(inside))
    key, new_key = "objects/secret", "objects/new"
    for action in (
        lambda: store.read(key),
        lambda: store.read_range(key, offset=0, num_bytes=1),
        lambda: store.read_ranges(key, [(0, 1)]),
        lambda: store.num_bytes(key),
        lambda: store.open_local_file(key),
        lambda: store.put(new_key, b""),
        lambda: store.put_new(new_key, b""),
        lambda: store.open_writer(new_key),
        lambda: store.delete(key),
        lambda: list(store.list("objects")),
    ):
        with pytest.raises(StoreError, match="leads out of the folder"):
            action()
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert list(store.list()) == []
