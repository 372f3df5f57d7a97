"""Inputs that change while a build runs: the build is that of one state of the files, or none."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mmerge.manifests.errors import CheckpointError, MmergeError
from mmerge.manifests.stores.local import LocalStore
from mmerge.manifests.stores.local_file import LocalFile
from mmerge.manifests.stores.memory import MemoryStore
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, run, verify
from mmerge.pipeline.execution.process_executor import ProcessExecutor
from mmerge.workers.tasks.scan_cache import read_scan, write_scan
from tests.changing_inputs import ChangeAt, Inputs, assert_no_object_is_wrong, replace

METHODS: dict[str, dict[str, Any]] = {
    "mmer": {},
    "mmer of the model": {"method": "mmer", "scope": "model"},
    "ties": {},
    "task_arithmetic": {},
    "slerp": {"t": 0.4},
    "tsv": {},
    "della": {"density": 0.5, "epsilon": 0.1},
    "ram": {},
}
"""A method of every kind: scans alone, refined thresholds, stages, rows, whole matrices."""


@pytest.fixture
def inputs(lab: Any) -> Inputs:
    return Inputs(lab)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_that_is_replaced_before_the_merge_gives_the_build_of_the_new_file(
    inputs: Inputs, method: str
) -> None:
    raw = {"method": method} | METHODS[method]
    first = inputs.expect("first", **raw)
    data = inputs.other_version("audio")
    progress = ChangeAt("merge", lambda: replace(inputs.file("audio"), data))
    report = inputs.run("store", progress=progress, **raw)
    assert progress.is_changed
    truth = inputs.expect("second", **raw)
    assert report.build == truth != first
    assert not verify(report.uri).damages
    folder = inputs.folder
    assert_no_object_is_wrong(folder / "store", folder / "first", folder / "second")


@pytest.mark.parametrize("phase", ["scan", "thresholds", "merge", "copy"])
@pytest.mark.parametrize("victim", ["base", "image"])
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_a_build_never_mixes_two_versions_of_a_file(
    inputs: Inputs, phase: str, victim: str, scope: str
) -> None:
    """Some shards are finished by the time; copies and merges of the base agree on its version."""
    inputs.lab.dtype = torch.float32  # whose thresholds need a second pass
    inputs.raw = inputs.lab.make_all(2)
    data = inputs.other_version(victim)
    progress = ChangeAt(phase, lambda: replace(inputs.file(victim), data), at_end=True)
    report = inputs.run("store", progress=progress, scope=scope)
    assert progress.is_changed
    assert report.build == inputs.expect(scope=scope)
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")


def test_processes_notice_as_well(inputs: Inputs) -> None:
    data = inputs.other_version("audio")
    progress = ChangeAt("merge", lambda: replace(inputs.file("audio"), data))
    executor = ProcessExecutor(num_processes=2)
    try:
        report = inputs.run("store", progress=progress, executor=executor)
    finally:
        executor.close()
    assert report.build == inputs.expect()
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")


def shift(path: Path) -> None:
    """Save a file again with a longer header: every tensor begins elsewhere."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {"format": "pt", "note": "x" * 512}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    replace(path, struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("method", ["mmer", "task_arithmetic", "slerp", "tsv"])
@pytest.mark.parametrize("phase", ["scan", "merge"])
def test_a_file_with_another_layout_is_refused_and_the_next_run_is_right(
    inputs: Inputs, method: str, phase: str
) -> None:
    raw = {"method": method} | METHODS[method]
    progress = ChangeAt(phase, lambda: shift(inputs.file("audio")))
    with pytest.raises(CheckpointError, match=r"expert 'audio': .*Run again"):
        inputs.run("store", progress=progress, **raw)
    assert not list((inputs.folder / "store" / "builds").glob("*/manifest.json"))
    assert inputs.run("store", **raw).build == inputs.expect(**raw)


def test_a_file_with_another_layout_is_refused_between_planning_and_running(inputs: Inputs) -> None:
    plan = make_plan(inputs.recipe("store"))
    shift(inputs.file("image"))
    with pytest.raises(CheckpointError, match=r"expert 'image': .* differs in place"):
        run(plan)


def test_a_file_of_equal_layout_may_be_replaced_between_planning_and_running(
    inputs: Inputs,
) -> None:
    plan = make_plan(inputs.recipe("store"))
    replace(inputs.file("image"), inputs.other_version("image"))
    assert run(plan).build == inputs.expect()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("lose", [truncate, Path.unlink])
@pytest.mark.parametrize("method", ["mmer", "task_arithmetic", "tsv"])
def test_a_file_that_is_lost_ends_the_run_and_names_the_tensor(
    inputs: Inputs, method: str, lose: Callable[[Path], None]
) -> None:
    raw = {"method": method} | METHODS[method]
    truth = inputs.expect(**raw)
    path = inputs.file("audio")
    data = path.read_bytes()
    with pytest.raises(MmergeError, match=r"audio: model.safetensors: .*, while language_model\."):
        inputs.run("store", progress=ChangeAt("merge", lambda: lose(path)), **raw)
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")
    path.write_bytes(data)
    assert inputs.run("store", **raw).build == truth


class Flips:
    """Flips a bit of some reads of one file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.name = name
        self.num_reads = 0
        self.is_flipped: Callable[[int], bool] = lambda number: False
        """Whether a read is flipped, by its number."""
        read_into = LocalFile.read_into

        def read(file: LocalFile, block: NDArray[np.uint8], *, offset: int) -> None:
            read_into(file, block, offset=offset)
            if self.name in file.name and len(block) and offset > 16:
                self.num_reads += 1
                if self.is_flipped(self.num_reads):
                    block[self.num_reads % len(block)] ^= 1 << self.num_reads % 8

        monkeypatch.setattr(LocalFile, "read_into", read)


@pytest.mark.parametrize("method", ["mmer of the model", "task_arithmetic", "tsv", "ram"])
@pytest.mark.parametrize("victim", ["base", "audio"])
def test_a_bit_that_flips_once_in_any_read_changes_nothing(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, method: str, victim: str
) -> None:
    raw = {"method": method} | METHODS[method]
    flips = Flips(monkeypatch, f"{victim}: model.safetensors")
    truth = inputs.expect(**raw)
    num_reads = flips.num_reads
    for number in np.linspace(1, num_reads, 6).astype(int).tolist():
        flips.num_reads = 0
        flips.is_flipped = lambda count, number=number: count == number
        store = f"store{number}"
        report = inputs.run(store, **raw)
        assert report.build == truth, number
        assert not verify(report.uri).damages
        assert_no_object_is_wrong(inputs.folder / store, inputs.folder / "truth")


def test_reads_that_keep_changing_end_the_run_and_name_input_tensor_and_digests(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = inputs.expect(method="task_arithmetic")
    flips = Flips(monkeypatch, "audio: model.safetensors")
    flips.is_flipped = lambda number: True
    with pytest.raises(MmergeError) as caught:
        inputs.run("store", method="task_arithmetic")
    message = str(caught.value)
    path = inputs.file("audio")
    assert "expert 'audio': language_model.model." in message
    assert str(path) in message
    assert "scanned again already" in message
    assert sum(len(word.strip(".,")) == 64 for word in message.split()) == 2
    assert message.count("of BLAKE3 ") == 2
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")
    flips.is_flipped = lambda number: False
    assert inputs.run("store", method="task_arithmetic").build == truth


def strip_checksums(store: Any) -> int:
    """Leave the stored scans as version 0.1 wrote them; returns how many had checksums."""
    num_stripped = 0
    for item in list(store.list("surveys")):
        digest = Path(item).stem
        scan = read_scan(store, digest)
        assert scan is not None
        num_stripped += bool(scan.checksums)
        write_scan(store, digest, dataclasses.replace(scan, checksums={}))
    return num_stripped


@pytest.mark.parametrize("has_checksums", [True, False])
def test_scans_without_checksums_stay_valid_and_are_compared_by_digest(
    inputs: Inputs,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_checksums: bool,
) -> None:
    inputs.run("store")
    store = open_store(str(inputs.folder / "store"))
    if not has_checksums:
        assert strip_checksums(store)
    again = inputs.run("store", density=0.3)
    assert again.num_computed["scan"] == 0
    assert again.num_computed["merge"] > 0
    truth = inputs.expect(density=0.4)
    flips = Flips(monkeypatch, "audio: model.safetensors")
    flips.is_flipped = lambda number: number == 1
    report = inputs.run("store", density=0.4)
    assert report.build == truth
    name = "XXH3" if has_checksums else "BLAKE3"
    assert f"the scan read bytes of {name} " in caplog.text
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")


def test_a_stored_scan_of_other_bytes_is_noticed_when_its_inputs_are_merged(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a file system had no times: the identity says that nothing changed."""
    monkeypatch.setattr(LocalStore, "identity", lambda store, key: "same")
    for scope in ("tensor", "model"):
        shutil.rmtree(inputs.folder / "store", ignore_errors=True)
        inputs.run("store", scope=scope)
        inputs.file("audio").write_bytes(inputs.other_version("audio"))
        report = inputs.run("store", scope=scope, density=0.3)
        assert report.build == inputs.expect(f"truth-{scope}", scope=scope, density=0.3)


def test_a_file_of_equal_size_and_time_is_not_taken_for_the_earlier_one(inputs: Inputs) -> None:
    path = inputs.file("audio")
    os.utime(path, (1e9, 1e9))
    first = inputs.run("store").build
    data = inputs.other_version("audio")
    assert len(data) == path.stat().st_size
    path.write_bytes(data)
    os.utime(path, (1e9, 1e9))
    report = inputs.run("store")
    assert report.is_new
    assert report.build == inputs.expect() != first


def test_a_configuration_that_changes_while_the_build_runs_is_refused(inputs: Inputs) -> None:
    path = inputs.folder / "audio" / "config.json"
    config = json.loads(path.read_text())
    progress = ChangeAt("scan", lambda: path.write_text(json.dumps(config | {"later": 1})))
    with pytest.raises(CheckpointError, match=r"'audio': .*config.json: was changed since"):
        inputs.run("store", progress=progress)
    assert inputs.run("store").build == inputs.expect()


def make_adapter(inputs: Inputs, seed: int) -> Path:
    """Replace the expert `image` by an adapter of one Linear layer."""
    generator = torch.Generator().manual_seed(seed)
    hidden = inputs.lab.config["hidden_size"]
    folder: Path = inputs.folder / "adapter"
    folder.mkdir(exist_ok=True)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {
        f"{prefix}.lora_A.weight": torch.randn((4, hidden), generator=generator),
        f"{prefix}.lora_B.weight": torch.randn((hidden, 4), generator=generator),
    }
    partial = folder / "partial"
    save_file(factors, partial)
    partial.replace(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    inputs.raw["experts"]["image"]["path"] = "adapter"
    return folder


@pytest.mark.parametrize("phase", ["scan", "merge"])
def test_factors_of_an_adapter_that_are_replaced_are_noticed(inputs: Inputs, phase: str) -> None:
    make_adapter(inputs, 1)
    first = inputs.expect("first")
    progress = ChangeAt(phase, lambda: make_adapter(inputs, 2))
    report = inputs.run("store", progress=progress)
    assert report.build == inputs.expect() != first


def test_the_scale_of_an_adapter_cannot_change_while_the_build_runs(inputs: Inputs) -> None:
    folder = make_adapter(inputs, 1)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16}
    path = folder / "adapter_config.json"
    progress = ChangeAt("scan", lambda: path.write_text(json.dumps(config)))
    with pytest.raises(CheckpointError, match=r"adapter_config.json: was changed since"):
        inputs.run("store", progress=progress)


def write_scaled(path: Path, tensors: dict[str, torch.Tensor], scale: float) -> None:
    """Write weights as float8 with one scale each."""
    scaled: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        is_linear = name.endswith("proj.weight")
        scaled[name] = value.to(torch.float8_e4m3fn) if is_linear else value
        if is_linear:
            scaled[f"{name}_scale_inv"] = torch.full((1, 1), scale)
    save_file(scaled, path.with_suffix(".new"), metadata={"format": "pt"})
    path.with_suffix(".new").replace(path)


def test_scales_of_float8_weights_that_are_replaced_are_noticed(inputs: Inputs) -> None:
    """The float8 values themselves stay; what is merged is their product with the scales."""
    path = inputs.file("audio")
    tensors = load_file(path)
    config_path = inputs.folder / "audio" / "config.json"
    config = json.loads(config_path.read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    config_path.write_text(json.dumps(config))
    write_scaled(path, tensors, 1.0)
    first = inputs.expect("first")
    progress = ChangeAt("merge", lambda: write_scaled(path, tensors, 1.25))
    report = inputs.run("store", progress=progress)
    assert report.build == inputs.expect() != first
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")


def test_a_bit_that_flips_once_on_the_way_from_a_store_changes_nothing(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = inputs.expect(method="task_arithmetic")
    names = {"base": inputs.raw, **inputs.raw["experts"]}
    stores = []  # what is in memory ends with the last store that holds it
    for name, record in names.items():
        uri = f"memory://{inputs.folder.name}-{name}"
        store = open_store(uri, create=True)
        stores.append(store)
        for path in (inputs.folder / name).iterdir():
            store.put(path.name, path.read_bytes())
        record["base" if name == "base" else "path"] = uri
    counts = {"reads": 0, "flipped": 0}
    read_range = MemoryStore.read_range

    def read(store: MemoryStore, key: str, *, offset: int, num_bytes: int, **other: Any) -> Any:
        data = read_range(store, key, offset=offset, num_bytes=num_bytes, **other)
        if not key.endswith(".safetensors") or not offset or "/store" in store.uri:
            return data
        counts["reads"] += 1
        if counts["reads"] != counts["flipped"]:
            return data
        flipped = bytearray(data)
        flipped[len(flipped) // 2] ^= 1
        return memoryview(flipped)

    monkeypatch.setattr(MemoryStore, "read_range", read)
    assert inputs.expect("remote", method="task_arithmetic") == truth
    for number in np.linspace(1, counts["reads"], 5).astype(int).tolist():
        counts |= {"reads": 0, "flipped": number}
        report = inputs.run(f"store{number}", method="task_arithmetic")
        assert report.build == truth, number
        assert_no_object_is_wrong(inputs.folder / f"store{number}", inputs.folder / "truth")
