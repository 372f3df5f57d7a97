"""Scan and merge in one pass: the same build as in two, from inputs that are read once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmerge.manifests.errors import MmergeError, NonFiniteError
from mmerge.manifests.format.safetensors_header import TensorSpec
from mmerge.manifests.stores.local_file import LocalFile
from mmerge.pipeline import make_plan, run, verify
from mmerge.pipeline.build import context as context_module
from mmerge.pipeline.build import threshold_search as search_module
from mmerge.pipeline.build.context import BuildContext
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.execution.open import ExecutorName, open_executor
from mmerge.workers.tasks import one_pass as one_pass_module
from tests.changing_inputs import (
    ChangeAt,
    Inputs,
    assert_no_object_is_wrong,
    read_objects,
    replace,
)

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear in float16": {"method": "linear", "dtype": "float16"},
    "task_arithmetic": {"scale": 0.5},
    "naive_mc": {},
    "dare_ties": {"density": 0.5},
    "dare_linear": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.1},
    "ties that trims nothing": {"method": "ties", "density": 1.0},
    "mmer that trims nothing": {"method": "mmer", "density": 1.0, "scope": "model"},
}
MORE_PASSES: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "slerp": {"t": 0.4},
    "breadcrumbs": {"density": 0.5, "gamma": 0.01},
    "dare_ties with norms": {"method": "dare_ties", "density": 0.5, "rescale": "norm"},
}
"""Methods that need thresholds, statistics or whole tensors before they merge."""


@pytest.fixture
def inputs(lab: Any) -> Inputs:
    return Inputs(lab)


def build(inputs: Inputs, store: str, *, executor: Executor | None = None, **raw: Any) -> Any:
    options = {name: raw.pop(name) for name in ("fresh", "progress") if name in raw}
    plan = make_plan(inputs.recipe(store, **raw))
    executor = executor or SerialExecutor(num_threads=1)
    return run(plan, executor=executor, one_pass=True, **options)


def recipe_of(method: str) -> dict[str, Any]:
    return {"method": method} | (METHODS | MORE_PASSES)[method]


class ReadBytes:
    """How often each byte of the weight files is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, NDArray[np.int64]] = {}
        read_into = LocalFile.read_into

        def read(file: LocalFile, block: NDArray[np.uint8], *, offset: int) -> None:
            read_into(file, block, offset=offset)
            if file.name.endswith("model.safetensors"):
                counts = self.counts.setdefault(file.name, np.zeros(file.num_bytes, np.int64))
                counts[offset : offset + len(block)] += 1

        monkeypatch.setattr(LocalFile, "read_into", read)

    def of(self, inputs: Inputs, owner: str, spec: TensorSpec) -> int:
        counts = self.counts[f"{inputs.folder / owner}: model.safetensors"]
        return int(counts[spec.offset : spec.offset + spec.num_bytes].max())


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_makes_the_same_build_and_reads_each_byte_once(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    raw = recipe_of(method)
    truth = inputs.run("truth", **raw)
    plan = make_plan(inputs.recipe("store", **raw))
    reads = ReadBytes(monkeypatch)  # planning compares some tensors, and has read them by now
    report = run(plan, executor=SerialExecutor(num_threads=1), one_pass=True)
    assert report.build == truth.build
    assert read_objects(inputs.folder / "store") == read_objects(inputs.folder / "truth")
    for shard in plan.merge_shards:
        for tensor in shard.tensors:
            sources = (tensor.base, *tensor.experts)
            for owner, source in zip(("base", "image", "audio"), sources, strict=True):
                is_copied = owner == "base" and plan.kind == "masks"
                assert reads.of(inputs, owner, source.spec) == 1 + is_copied, source
    assert report.num_computed["merge"] == len(plan.merge_shards)
    assert report.bytes_read < truth.bytes_read
    assert not verify(report.uri).damages


@pytest.mark.parametrize("method", MORE_PASSES)
def test_methods_that_need_more_than_a_block_are_scanned_first(inputs: Inputs, method: str) -> None:
    raw = recipe_of(method)
    truth = inputs.run("truth", **raw)
    report = build(inputs, "store", **raw)
    assert report.build == truth.build
    assert report.num_computed == truth.num_computed
    assert report.bytes_read == truth.bytes_read


@pytest.mark.parametrize("name", ["processes", pytest.param("ray", marks=pytest.mark.ray)])
def test_other_executors_make_the_same_build(inputs: Inputs, name: ExecutorName) -> None:
    truth = inputs.expect(method="linear")
    executor = open_executor(name, num_workers=2)
    try:
        assert build(inputs, "store", executor=executor, method="linear").build == truth
    finally:
        executor.close()


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_where_nothing_is_trimmed_names_and_bytes_are_those_of_a_search(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    raw = {"method": "mmer", "density": 1.0, "scope": scope}
    report = build(inputs, "store", **raw)
    assert "thresholds" not in report.num_computed
    # A density that rounds to every entry is searched for.
    monkeypatch.setattr("mmerge.workers.methods.ties._densities", lambda *_: (1 - 1e-15,) * 2)
    monkeypatch.setattr(search_module, "trim_rank", lambda *_, **__: 0)
    searched = inputs.run("searched", **raw)
    assert "thresholds" in searched.num_computed
    assert read_objects(inputs.folder / "store") == read_objects(inputs.folder / "searched")
    assert report.build == searched.build


def test_a_scan_of_one_pass_serves_the_next_build_and_is_compared_with(inputs: Inputs) -> None:
    first = build(inputs, "store", method="task_arithmetic", scale=0.5)
    second = build(inputs, "store", method="task_arithmetic", scale=0.6)
    assert second.build == inputs.expect(method="task_arithmetic", scale=0.6) != first.build
    assert second.num_computed["scan"] == 0
    assert second.num_reused["scan"] > 0
    progress = ChangeAt("merge", lambda: replace(inputs.file("audio"), data))
    data = inputs.other_version("audio")
    third = build(inputs, "store", method="task_arithmetic", scale=0.7, progress=progress)
    assert third.build == inputs.expect("third", method="task_arithmetic", scale=0.7)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_file_that_is_replaced_during_the_pass_gives_the_build_of_one_version(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    first = inputs.expect("first", method="linear")
    data = inputs.other_version("audio")
    count = {"reads": 0}
    read_into = LocalFile.read_into

    def read(file: LocalFile, block: NDArray[np.uint8], *, offset: int) -> None:
        read_into(file, block, offset=offset)
        count["reads"] += "audio: model.safetensors" in file.name
        if count["reads"] == stop:
            count["reads"] += 1
            replace(inputs.file("audio"), data)

    stop = -1
    monkeypatch.setattr(LocalFile, "read_into", read)
    build(inputs, "dry", method="linear")
    stop, count["reads"] = int(share * count["reads"]), 0
    report = build(inputs, "store", method="linear")
    truth = inputs.expect("second", method="linear")
    # Near the end everything was read from the earlier file, which is still open.
    assert report.build == truth or (share == 0.9 and report.build == first)
    assert truth != first
    assert not verify(report.uri).damages
    folder = inputs.folder
    assert_no_object_is_wrong(folder / "store", folder / "first", folder / "second")


def test_a_pass_that_is_cut_off_leaves_no_object_and_the_next_run_goes_on(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = inputs.expect(method="linear")
    num_stored = {"objects": 0}
    store_object = one_pass_module.store_object

    def fail(*arguments: Any) -> Any:
        num_stored["objects"] += 1
        if num_stored["objects"] == 2:
            raise MmergeError("cut off")
        return store_object(*arguments)

    monkeypatch.setattr(one_pass_module, "store_object", fail)
    with pytest.raises(MmergeError, match="cut off"):
        build(inputs, "store", method="linear")
    kept = len(read_objects(inputs.folder / "store"))
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")
    report = build(inputs, "store", method="linear")
    assert report.build == truth
    assert report.num_reused["merge"] + report.num_reused["copy"] == kept
    assert not verify(report.uri).damages


def forget(store: Path, *folders: str) -> None:
    for folder in folders:
        shutil.rmtree(store / folder)


@pytest.mark.parametrize("is_damaged", [False, True])
def test_an_object_that_is_there_is_compared_and_kept_or_repaired(
    inputs: Inputs, is_damaged: bool
) -> None:
    first = build(inputs, "store", method="linear")
    store = inputs.folder / "store"
    objects = read_objects(store)
    forget(store, "surveys", "builds", "refs")
    if is_damaged:
        path = max(store.glob("objects/*.safetensors"), key=lambda path: path.stat().st_size)
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    report = build(inputs, "store", method="linear")
    assert report.build == first.build
    assert read_objects(store) == objects
    assert report.num_computed["merge"] == is_damaged
    assert not verify(report.uri).damages


def test_a_fresh_pass_is_compared_with_the_stored_build(inputs: Inputs) -> None:
    first = build(inputs, "store", method="linear")
    again = build(inputs, "store", method="linear", fresh=True)
    assert again.is_compared
    assert again.build == first.build
    assert again.num_computed["merge"] > 0


def test_a_value_that_is_not_finite_is_refused_before_anything_is_stored(inputs: Inputs) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    inputs.lab.base[name][3, 2] = torch.inf
    inputs.lab.write("base", inputs.lab.base, inputs.lab.config)
    with pytest.raises(NonFiniteError, match=rf"base: {name}: Inf at \[3, 2\]"):
        build(inputs, "store", method="linear")
    inputs.run("truth", method="linear", non_finite="keep")
    stored, true = (
        len(list((inputs.folder / store / "surveys").iterdir())) for store in ("store", "truth")
    )
    assert stored == true - 1
    assert_no_object_is_wrong(inputs.folder / "store", inputs.folder / "truth")


def test_objects_are_held_only_within_the_memory_that_is_allowed(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(inputs.recipe("store", method="linear"))
    shard = plan.merge_shards[1]

    def merges_in_one_pass(memory_bytes: int | None = None, *, one_pass: bool = True) -> bool:
        limited = make_plan(inputs.recipe("store", method="linear"), memory_bytes=memory_bytes)
        context = BuildContext(limited, fresh=False, one_pass=one_pass)
        return context.merges_in_one_pass(limited.merge_shards[1])

    assert merges_in_one_pass()
    assert not merges_in_one_pass(one_pass=False)
    without_object = context_module.process_bytes([shard.peak_bytes])
    assert merges_in_one_pass(without_object + shard.bytes_out)
    assert not merges_in_one_pass(without_object + shard.bytes_out - 1)
    monkeypatch.setattr(context_module, "MAX_HELD_BYTES", shard.bytes_out - 1)
    assert not merges_in_one_pass()
