"""Files of weights: every published form gives the same tensors, an unclear one is refused."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from mmerge.manifests.errors import CheckpointError
from mmerge.pipeline import export, make_plan, parse_recipe, read_recipe, run
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import OpenStores
from mmerge.workers.composite.served_models import refuse_unserved
from mmerge.workers.reconstruction.language_reader import LanguageReader

SHARDS = {
    "safetensors": ("model-0000{}-of-00002.safetensors", "model.safetensors.index.json"),
    "bin": ("pytorch_model-0000{}-of-00002.bin", "pytorch_model.bin.index.json"),
}
Tensors = dict[str, torch.Tensor]


def write(tensors: Tensors, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def rewrite(folder: Path, kind: str, *, sharded: bool, indexed: bool) -> None:
    """Write the weights of a checkpoint in another form."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        write(tensors, folder / ("pytorch_model.bin" if kind == "bin" else "model.safetensors"))
        return
    pattern, index = SHARDS[kind]
    names = sorted(tensors)
    weight_map = {}
    for number in (1, 2):
        part = names[number - 1 :: 2]
        write({name: tensors[name] for name in part}, folder / pattern.format(number))
        weight_map |= dict.fromkeys(part, pattern.format(number))
    if indexed:
        (folder / index).write_text(json.dumps({"weight_map": weight_map}))


def build(lab: Any, raw: dict[str, Any], output: str) -> dict[str, bytes]:
    run(make_plan(parse_recipe(raw | {"output": output}, folder=lab.folder)))
    return {path.name: path.read_bytes() for path in (lab.folder / output / "objects").iterdir()}


@pytest.mark.parametrize(
    ("kind", "sharded", "indexed"),
    [
        ("bin", False, False),
        ("bin", True, True),
        ("bin", True, False),
        ("safetensors", True, True),
        ("safetensors", True, False),
    ],
)
def test_every_form_of_a_checkpoint_gives_the_same_objects(
    lab: Any, kind: str, sharded: bool, indexed: bool
) -> None:
    raw = lab.make_all(2)
    expected = build(lab, raw, "expected")
    for name in ("base", "image"):
        rewrite(lab.folder / name, kind, sharded=sharded, indexed=indexed)
    assert build(lab, raw, "store") == expected


def test_tensors_that_save_model_dropped_as_shared_are_there(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    save_model(model, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert len(load_file(tmp_path / "model.safetensors")) == 1
    tensors = Checkpoint(str(tmp_path), owner="base").tensors
    assert sorted(tensors) == ["a.weight", "b.weight"]
    for name, source in tensors.items():
        data = read_source(source, stores=OpenStores(), offset=0, num_bytes=64)
        assert bytes(data) == model.a.weight.detach().numpy().tobytes(), name


@pytest.mark.parametrize("owner", ["base", "image"])
def test_rotary_buffers_of_old_files_are_left_out(lab: Any, owner: str) -> None:
    raw = lab.make_all(2)
    expected = build(lab, raw, "expected")
    path = lab.folder / owner / "model.safetensors"
    tensors = load_file(path)
    prefix = "language_model." if owner == "image" else ""
    tensors[f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    save_file(tensors, path)
    assert build(lab, raw, "store") == expected


def write_single_beside_index(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "copy")
    rewrite(folder, "safetensors", sharded=True, indexed=True)
    (folder / "copy").rename(folder / "model.safetensors")


def write_incomplete_shards(folder: Path) -> None:
    rewrite(folder, "bin", sharded=True, indexed=False)
    (folder / SHARDS["bin"][0].format(1)).unlink()


def write_a_tensor_twice(folder: Path) -> None:
    rewrite(folder, "safetensors", sharded=True, indexed=False)
    first, second = (folder / SHARDS["safetensors"][0].format(number) for number in (1, 2))
    name, value = next(iter(load_file(first).items()))
    write(load_file(second) | {name: value}, second)


def write_an_unlisted_tensor(folder: Path) -> None:
    rewrite(folder, "safetensors", sharded=True, indexed=True)
    path = folder / SHARDS["safetensors"][0].format(1)
    write(load_file(path) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}, path)


def write_bin(folder: Path, value: Any) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(value, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def write_code(folder: Path) -> None:
    write_bin(folder, {"weight": Dangerous(folder / "executed")})


def write_text_in_bin(folder: Path) -> None:
    write_bin(folder, {"weight": "text"})


def write_transposed(folder: Path) -> None:
    write_bin(folder, {"weight": torch.rand(3, 4).T})


def write_compressed(folder: Path) -> None:
    repack(write_bin(folder, {"weight": torch.zeros(256, 256)}), zipfile.ZIP_DEFLATED)


def write_big_endian(folder: Path) -> None:
    repack(write_bin(folder, {"weight": torch.ones(4)}), zipfile.ZIP_STORED, byteorder=b"big")


def write_old_format(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save({"weight": torch.ones(4)}, path, _use_new_zipfile_serialization=False)


class Dangerous:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def repack(path: Path, compression: int, *, byteorder: bytes | None = None) -> None:
    """Write an archive of torch.save again with other properties."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            is_order = name.endswith("/byteorder") and byteorder is not None
            archive.writestr(name, byteorder if is_order and byteorder else data)


@pytest.mark.parametrize(
    ("write_folder", "message"),
    [
        (write_single_beside_index, "has both model.safetensors and"),
        (write_incomplete_shards, "not all shards of one model"),
        (write_a_tensor_twice, "no index says which of the two counts"),
        (write_an_unlisted_tensor, "which the index does not name"),
        (write_code, "cannot be read as a file of tensors"),
        (write_text_in_bin, "weight is a str, not a tensor"),
        (write_transposed, "cannot be read by byte range"),
        (write_compressed, "is compressed"),
        (write_big_endian, "not little-endian"),
        (write_old_format, "cannot be read as a file of tensors"),
    ],
)
def test_unclear_files_are_refused(
    lab: Any, write_folder: Callable[[Path], None], message: str
) -> None:
    folder = lab.make_base()
    write_folder(folder)
    with pytest.raises(CheckpointError, match=message):
        _ = Checkpoint(str(folder), owner="base").tensors
    assert not (folder / "executed").exists()


def test_infinity_in_a_configuration_is_read_and_nan_is_not(lab: Any) -> None:
    folder = lab.make_base()
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    assert Checkpoint(str(folder), owner="base").config["time_step_limit"][1] == float("inf")
    path.write_text(text.replace("{", '{"time_step_limit": NaN, ', 1))
    with pytest.raises(CheckpointError, match="NaN is no JSON number"):
        Checkpoint(str(folder), owner="base")


def test_a_model_whose_configuration_has_infinity_is_built_read_and_exported(lab: Any) -> None:
    raw = lab.make_all(1)
    for name in ("base", *raw["experts"]):
        path = lab.folder / name / "config.json"
        text = path.read_text()
        path.write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity], ', 1))
    report = run(make_plan(read_recipe(lab.write_recipe(raw))))
    refuse_unserved(LanguageReader(report.uri), None)
    folder = lab.folder / "exported"
    export(report.uri, folder, expert="image")
    assert Checkpoint(str(folder), owner="base").config["time_step_limit"][1] == float("inf")


@pytest.mark.parametrize(
    "config", [{"model_type": ["llama"]}, {"model_type": []}, {"text_config": {"model_type": 1}}]
)
def test_a_model_type_that_is_no_text_is_refused(lab: Any, config: dict[str, Any]) -> None:
    folder = lab.make_base()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"model_type .* is no text"):
        Checkpoint(str(folder), owner="base")
