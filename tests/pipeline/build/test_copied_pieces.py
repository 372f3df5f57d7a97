"""Copies whose rows were scanned in several pieces are reused only where all pieces are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.build.input_scan import InputDigests, ScannedRows
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.planning.plan import MergePlan
from mmerge.pipeline.planning.shards import CopyShard
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.task import CopyTensor

EMBEDDING = "model.embed_tokens.weight"
ROW_BYTES = 32
NUM_ROWS = 40


def scan_in_pieces_of(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    num_bytes = num_rows * ROW_BYTES
    monkeypatch.setattr("mmerge.pipeline.planning.shards.MAX_PIECE_BYTES", num_bytes)


def rows_of_copies(plan: MergePlan) -> list[tuple[int, int]]:
    return [
        (tensor.row_start, tensor.row_stop)
        for shard in plan.base_shards
        for tensor in shard.tensors
        if tensor.name == EMBEDDING
    ]


def rows_of_scans(plan: MergePlan) -> list[tuple[int, int]]:
    return [
        (tensor.row_start, tensor.row_stop)
        for shard in plan.merge_shards
        for tensor in shard.tensors
        if tensor.name == EMBEDDING
    ]


@pytest.mark.parametrize("changed_row", [0, 8, NUM_ROWS - 1])
def test_a_base_that_differs_in_any_scanned_piece_is_copied_again(
    lab: Any, monkeypatch: pytest.MonkeyPatch, changed_row: int
) -> None:
    scan_in_pieces_of(8, monkeypatch)
    recipe = lab.write_recipe(lab.make_all())
    plan = make_plan(read_recipe(recipe))
    assert rows_of_copies(plan) == [(0, NUM_ROWS)]
    assert len(rows_of_scans(plan)) == NUM_ROWS // 8
    run(plan, executor=SerialExecutor(num_threads=1))
    lab.base[EMBEDDING][changed_row] += 1
    lab.write("base", lab.base, lab.config)
    report = run(make_plan(read_recipe(recipe)), executor=SerialExecutor(num_threads=1))
    assert report.num_computed["copy"] == 1
    reader = BuildReader(str(lab.folder / "store"))
    assert torch.equal(reader.read(EMBEDDING, "base"), lab.base[EMBEDDING])


@pytest.mark.parametrize("num_threads", [1, 4])
def test_bounds_of_copies_may_lie_within_scanned_pieces(
    lab: Any, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    scan_in_pieces_of(9, monkeypatch)
    recipe = lab.write_recipe(lab.make_all())

    def build() -> dict[str, int]:
        plan = make_plan(read_recipe(recipe), max_shard_bytes=16 * ROW_BYTES)
        assert rows_of_copies(plan) == [(0, 16), (16, 32), (32, 40)]
        assert rows_of_scans(plan) == [(0, 9), (9, 18), (18, 27), (27, 36), (36, 40)]
        return dict(run(plan, executor=SerialExecutor(num_threads=num_threads)).num_computed)

    build()
    # The second copy begins in the scanned rows 9 to 17: the last of them are its own.
    lab.base[EMBEDDING][17] += 1
    lab.write("base", lab.base, lab.config)
    build()
    reader = BuildReader(str(lab.folder / "store"))
    assert torch.equal(reader.read(EMBEDDING, "base"), lab.base[EMBEDDING])


def make_digests(*pieces: ScannedRows) -> InputDigests:
    return InputDigests(copied={("", EMBEDDING): {piece.row_start: piece for piece in pieces}})


def make_copy(lab: Any, row_start: int, row_stop: int) -> tuple[CopyShard, CopyTensor]:
    plan = make_plan(read_recipe(lab.write_recipe(lab.make_all(1))))
    shard = next(shard for shard in plan.base_shards if shard.tensors[0].name == EMBEDDING)
    source = shard.tensors[0].source.to_rows(row_start, row_stop)
    return shard, CopyTensor(EMBEDDING, "base", row_start, row_stop, source)


def test_a_copy_is_identified_by_every_scanned_piece_that_has_some_of_its_rows(lab: Any) -> None:
    pieces = [ScannedRows(0, 10, "a"), ScannedRows(10, 20, "b"), ScannedRows(20, 30, "c")]
    digests = make_digests(*reversed(pieces))
    assert digests.identify(*make_copy(lab, 10, 20)) == "b"
    assert digests.identify(*make_copy(lab, 10, 19)) == [[10, "b"]]
    assert digests.identify(*make_copy(lab, 9, 21)) == [[0, "a"], [10, "b"], [20, "c"]]


@pytest.mark.parametrize("rows", [(0, 10), (12, 22), (20, 32)])
def test_a_copy_of_rows_that_were_not_scanned_is_refused(lab: Any, rows: tuple[int, int]) -> None:
    digests = make_digests(ScannedRows(8, 14, "a"), ScannedRows(20, 30, "b"))
    with pytest.raises(LookupError, match="are copied before they are scanned"):
        digests.identify(*make_copy(lab, *rows))
