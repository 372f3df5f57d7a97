"""One behaviour, every executor: bytes that depend on nothing but inputs and numbers, and runs that
continue.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmerge.manifests.errors import MmergeError, NonFiniteError, StoreError, TaskErrors
from mmerge.manifests.format.table import read_table
from mmerge.manifests.stores.open import open_store
from mmerge.pipeline import make_plan, read_recipe, run, verify
from mmerge.pipeline.execution.executor import Executor, SerialExecutor
from mmerge.pipeline.execution.open import open_executor
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    executor = RayExecutor(num_workers=2)
    yield executor
    executor.close()


@pytest.fixture(params=["serial", pytest.param("ray", marks=pytest.mark.ray)])
def executor(request: pytest.FixtureRequest) -> Executor:
    return (
        SerialExecutor() if request.param == "serial" else request.getfixturevalue("ray_executor")
    )


def digests(folder: Path) -> dict[str, str]:
    """Every object, file, manifest and table of a store (references hold times, scans are caches
    of paths).

    What a killed run was writing lies under a temporary name.
    """
    found = [
        path
        for part in ("objects", "files", "builds")
        for path in (folder / part).rglob("*")
        if path.is_file()
    ]
    found = [path for path in found if "#" not in path.name and not path.name.startswith(".")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def test_a_build_is_made_once_and_a_second_run_does_nothing(lab: Any, executor: Executor) -> None:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all())))
    first = run(plan, executor=executor)
    assert first.is_new
    assert first.num_computed == {"scan": 8, "thresholds": 0, "merge": 5, "copy": 8}
    before = digests(lab.folder / "store")
    second = run(plan, executor=executor)
    assert (second.is_new, second.moved, second.bytes_read) == (False, False, 0)
    assert second.build == first.build
    assert digests(lab.folder / "store") == before
    verify(str(lab.folder / "store")).check()


@pytest.mark.ray
def test_bytes_do_not_depend_on_executor_workers_or_block_size(
    lab: Any, ray_executor: Executor
) -> None:
    lab.config |= {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "vocab_size": 300}
    raw = lab.make_all()
    found = []
    # `ray_executor` holds a Ray of two workers in this process; the one of one worker lives in a
    # process of its own.
    for name, executor, block_entries in (
        ("a", SerialExecutor(), 1 << 18),
        ("b", SerialExecutor(), 1 << 16),
        ("c", ray_executor, 1 << 16),
    ):
        plan = make_plan(
            read_recipe(lab.write_recipe(raw | {"output": name})), block_entries=block_entries
        )
        run(plan, executor=executor)
        found.append(digests(lab.folder / name))
    lab.write_recipe(raw | {"output": "d"}, "d.yaml")
    command = [
        sys.executable,
        "-m",
        "mmerge.pipeline.cli.main",
        "run",
        str(lab.folder / "d.yaml"),
        "--workers",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found.append(digests(lab.folder / "d"))
    assert len(found[0]) > 20
    assert found[0] == found[1] == found[2] == found[3]
    assert any(
        tensor.num_entries > 1 << 16 for shard in plan.merge_shards for tensor in shard.tensors
    ), "one block would prove nothing"


def test_masks_and_task_vector_equal_the_arithmetic_on_whole_tensors(lab: Any) -> None:
    raw = lab.make_all()
    run(make_plan(read_recipe(lab.write_recipe(raw)), block_entries=1 << 16))
    reader = BuildReader(str(lab.folder / "store"))
    experts = [lab.expert_tensors(seed) for seed in range(3)]
    names = sorted(lab.base)
    deltas = [
        torch.cat(
            [
                (
                    expert["language_model." + name][: lab.base[name].shape[0]].float()
                    - lab.base[name].float()
                ).flatten()
                for name in names
            ]
        )
        for expert in experts
    ]
    rank = len(deltas[0]) - int(0.8 * len(deltas[0]))
    trimmed = [
        torch.where(delta.abs() >= delta.abs().kthvalue(rank).values, delta, 0.0)
        for delta in deltas
    ]
    sign = (trimmed[0] + trimmed[1] + trimmed[2]).sign()
    star = (
        sum(torch.where(delta.sign() == sign, delta, 0.0) for delta in trimmed)
        .to(torch.bfloat16)
        .float()
    )  # type: ignore[union-attr]
    position = 0
    for name in names:
        stop = position + lab.base[name].numel()
        assert reader.read(name, "delta").float().flatten().equal(star[position:stop]), name
        for index, expert in enumerate(("image", "audio", "video")):
            expected = (
                (trimmed[index].sign() == star.sign())
                & (star != 0)
                & (trimmed[index].abs() >= 0.375 * star.abs())
            )
            base = lab.base[name].float().flatten()
            rebuilt = (base + torch.where(expected[position:stop], star[position:stop], 0.0)).to(
                torch.bfloat16
            )
            found = rebuild_weight(reader, name, expert=expert)
            assert found[: lab.base[name].shape[0]].flatten().equal(rebuilt), name
            if found.shape != lab.base[name].shape:
                assert found[-2:].equal(experts[index]["language_model." + name][-2:])
        position = stop


def test_statistics_count_what_the_masks_say(lab: Any) -> None:
    report = run(make_plan(read_recipe(lab.write_recipe(lab.make_all()))))
    assert report.manifest is not None
    reader = BuildReader(str(lab.folder / "store"))
    table = read_table(reader.store, report.manifest.table)
    rows = {(row.name, row.role, row.expert): row for row in table}
    for name in lab.base:
        masks = torch.stack(
            [
                (
                    rebuild_weight(reader, name, expert=expert)[: lab.base[name].shape[0]]
                    != reader.read(name, "base")
                )
                for expert in ("image", "audio", "video")
            ]
        )
        row = rows[(name, "delta", "")]
        assert row.statistics is not None
        assert row.statistics.consensus is not None
        assert sum(row.statistics.consensus) == row.statistics.num_entries == lab.base[name].numel()
        assert row.statistics.overlaps is not None
        for index, expert in enumerate(("image", "audio", "video")):
            found = rows[(name, "mask", expert)].statistics
            assert found is not None
            assert found.num_masked is not None
            assert found.num_masked >= int(masks[index].sum()), (
                "a masked entry may vanish in rounding, never appear"
            )
            assert found.num_agreeing is not None
            assert found.num_kept is not None
            assert found.num_masked <= found.num_agreeing <= found.num_kept <= found.num_entries


@pytest.mark.parametrize("method", ["naive_mc", "task_arithmetic", "linear"])
def test_static_merges_equal_their_formula(lab: Any, method: str) -> None:
    raw = lab.make_all() | {"method": method}
    run(make_plan(read_recipe(lab.write_recipe(raw)), block_entries=1 << 16))
    reader = BuildReader(str(lab.folder / "store"))
    for name, base in lab.base.items():
        experts = [
            lab.expert_tensors(seed)["language_model." + name][: base.shape[0]].float()
            for seed in range(3)
        ]
        total = sum(expert - base.float() for expert in experts)
        expected = base.float() + (total if method == "task_arithmetic" else total / 3)
        torch.testing.assert_close(
            reader.read(name, "merged").float(), expected, rtol=0.01, atol=1e-6
        )


def test_splitting_layers_and_tensors_changes_no_number(lab: Any) -> None:
    raw = lab.make_all()
    for name, size in (("whole", 1 << 30), ("split", 300)):
        run(make_plan(read_recipe(lab.write_recipe(raw | {"output": name})), max_shard_bytes=size))
    whole, split = (BuildReader(str(lab.folder / name)) for name in ("whole", "split"))
    assert len(split.manifest.entries) > len(whole.manifest.entries)
    for name in lab.base:
        assert split.read(name, "delta").equal(whole.read(name, "delta"))
        for expert in ("image", "audio", "video"):
            assert rebuild_weight(split, name, expert=expert).equal(
                rebuild_weight(whole, name, expert=expert)
            )


def test_another_number_reuses_the_scan_the_base_and_what_is_carried(lab: Any) -> None:
    raw = lab.make_all()
    first = run(make_plan(read_recipe(lab.write_recipe(raw))))
    second = run(make_plan(read_recipe(lab.write_recipe(raw | {"mask_scale": 0.9}))))
    assert second.build != first.build
    assert second.num_computed == {"scan": 0, "thresholds": 0, "merge": 5, "copy": 0}
    assert second.reference.number == 2
    back = run(make_plan(read_recipe(lab.write_recipe(raw))))
    assert (back.is_new, back.moved, back.build, back.reference.number) == (
        False,
        True,
        first.build,
        3,
    )


def test_one_changed_layer_of_one_expert_merges_that_layer_alone_under_scope_tensor(
    lab: Any,
) -> None:
    raw = lab.make_all() | {"scope": "tensor"}
    run(make_plan(read_recipe(lab.write_recipe(raw))))
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors.update({name: tensors[name] + 1}))
    again = run(make_plan(read_recipe(lab.write_recipe(raw))))
    assert again.num_computed["merge"] == 1
    assert again.num_computed["copy"] == 0


def test_two_experts_with_equal_encoders_share_one_object(lab: Any) -> None:
    lab.make_base()
    for name in ("one", "two"):
        tensors = lab.expert_tensors(3)
        tensors["language_model.model.norm.weight"] = tensors[
            "language_model.model.norm.weight"
        ] + len(name + "x" * (name == "two"))
        lab.write(name, tensors, lab.expert_config())
    experts = {name: {"path": name, "modality": "image"} for name in ("one", "two")}
    raw = {"base": "base", "method": "mmer", "output": "store", "experts": experts}
    report = run(make_plan(read_recipe(lab.write_recipe(raw))))
    assert report.manifest is not None
    carried = {
        entry.expert: entry.key for entry in report.manifest.entries if entry.role == "carry"
    }
    assert carried["one"] == carried["two"]
    reader = BuildReader(str(lab.folder / "store"))
    assert reader.names("carried", "one") == reader.names("carried", "two") != []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_input_is_named_with_its_place_unless_it_is_to_be_kept(
    lab: Any, value: float, executor: Executor
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = value

    raw = lab.make_all()
    lab.make_expert("audio", 1, change=spoil)
    word = "NaN" if value != value else "Inf"
    with pytest.raises(
        NonFiniteError,
        match=(
            r"expert 'audio': language_model\.model\.layers\.1\.mlp\.up_proj\.weight:"
            rf" {word} at \[3, 5\]"
        ),
    ):
        run(make_plan(read_recipe(lab.write_recipe(raw))), executor=executor)
    assert not list((lab.folder / "store").glob("builds/*/manifest.json"))
    run(make_plan(read_recipe(lab.write_recipe(raw | {"non_finite": "keep"}))), executor=executor)


def test_all_failures_are_reported_together_and_finished_shards_are_kept(lab: Any) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
        tensors["multi_modal_projector.linear_1.weight"][0, 1] = float("inf")

    raw = lab.make_all()
    lab.make_expert("audio", 1, change=spoil)
    with pytest.raises(TaskErrors) as caught:
        run(make_plan(read_recipe(lab.write_recipe(raw))))
    assert len(caught.value.failures) == 2
    assert "up_proj" in str(caught.value)
    assert "Inf at [0, 1]" in str(caught.value)
    lab.make_expert("audio", 1)
    again = run(make_plan(read_recipe(lab.write_recipe(raw))))
    assert again.num_reused["scan"] >= 5 or again.num_computed["scan"] < 8


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(lab: Any) -> None:
    (lab.folder / "file").write_text("")
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"output": "file/store"})))
    with pytest.raises(StoreError, match="Choose another 'output' or grant write access"):
        run(plan)


@pytest.mark.ray
def test_ray_refuses_a_store_of_this_process_and_more_memory_than_a_node_has(
    lab: Any, ray_executor: Executor
) -> None:
    raw = lab.make_all()
    with pytest.raises(StoreError, match="--executor serial"):
        run(
            make_plan(read_recipe(lab.write_recipe(raw | {"output": "memory://x"}))),
            executor=ray_executor,
        )
    plan = make_plan(read_recipe(lab.write_recipe(raw)), block_entries=1 << 16)
    shards = tuple(
        type(shard)(**(vars(shard) | {"peak_bytes": 1 << 50})) for shard in plan.merge_shards
    )
    with pytest.raises(MmergeError, match="the largest node offers"):
        run(type(plan)(**(vars(plan) | {"merge_shards": shards})), executor=ray_executor)


def test_an_address_without_ray_is_refused() -> None:
    with pytest.raises(MmergeError, match="--address has no effect"):
        open_executor("serial", address="auto")


def test_a_run_that_was_killed_continues_and_ends_with_the_same_bytes(lab: Any) -> None:
    lab.config |= {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "head_dim": 128,
        "num_hidden_layers": 6,
    }
    raw = lab.make_all()
    run(make_plan(read_recipe(lab.write_recipe(raw | {"output": "undisturbed"}))))
    recipe = lab.write_recipe(raw | {"output": "killed"}, "killed.yaml")
    command = [
        sys.executable,
        "-m",
        "mmerge.pipeline.cli.main",
        "run",
        str(recipe),
        "--executor",
        "serial",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    finished_line = re.compile(r"(merge|copy) (\S+): \S+ \w+ in ")
    seen = set()
    for line in process.stderr:
        seen |= set(finished_line.findall(line))
        if any(phase == "merge" for phase, _ in seen):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stderr.close()
    folder = lab.folder / "killed"
    assert not list(folder.glob("builds/*/manifest.json"))
    finished = {path.name: path.stat().st_mtime_ns for path in (folder / "objects").glob("*.json")}
    assert 1 <= len(finished) < len(list((lab.folder / "undisturbed" / "objects").glob("*.json")))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not seen & set(finished_line.findall(done.stderr)), "a finished shard was computed again"
    assert all(
        (folder / "objects" / name).stat().st_mtime_ns == when for name, when in finished.items()
    )
    assert digests(folder) == digests(lab.folder / "undisturbed")


def test_log_lines_are_written_where_there_is_no_terminal(
    lab: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mmerge.run"):
        run(make_plan(read_recipe(lab.write_recipe(lab.make_all()))))
    assert any("merge layers.0:" in record.message for record in caplog.records)


def test_a_store_in_memory_serves_a_serial_run(lab: Any) -> None:
    store = open_store("memory://serial")
    report = run(
        make_plan(read_recipe(lab.write_recipe(lab.make_all() | {"output": "memory://serial"})))
    )
    assert store.exists(f"builds/{report.build}/manifest.json")


@pytest.mark.parametrize("method", ["mmer", "ties", "breadcrumbs", "della", "sce"])
def test_the_compiled_path_and_the_method_write_the_same_objects(
    lab: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.config |= {"hidden_size": 192, "intermediate_size": 301, "head_dim": 48, "vocab_size": 301}
    raw = lab.make_all() | {"method": method}
    run(
        make_plan(
            read_recipe(lab.write_recipe(raw | {"output": "compiled"})), block_entries=1 << 16
        )
    )
    monkeypatch.setattr("mmerge.workers.tasks.merge.find_compiled_pass", lambda *_: None)
    run(
        make_plan(
            read_recipe(lab.write_recipe(raw | {"output": "reference"})), block_entries=1 << 17
        )
    )
    assert digests(lab.folder / "compiled") == digests(lab.folder / "reference")
