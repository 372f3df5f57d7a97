"""A small part of `make reproduce`: its ablations, its jobs, its rows, and the committed page."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mmerge.workers.methods import method_names
from mmerge.workers.methods.mask_rules import decouple
from mmerge.workers.methods.registry import unregister_method
from mmerge.workers.modalities import encoders

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"table", "method", "task", "seed", "metric", "value", "performance_retention"}


class Modules:
    """The modules of the reproduction."""

    def __init__(self) -> None:
        for name in (
            "ablations",
            "calibration",
            "changes",
            "measure",
            "page",
            "rows",
            "sets",
            "tables",
        ):
            setattr(self, name, importlib.import_module(f"evidence.{name}"))
        self.reproduce = importlib.import_module("reproduce")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    before = set(method_names())
    yield Modules()
    encoders._makers.clear()
    for name in set(method_names()) - before:
        unregister_method(name)


def test_ablations_leave_out_one_test_each_and_euclidean_masks_are_those_of_scale_one(
    evidence: Any,
) -> None:
    generator = torch.Generator().manual_seed(0)
    trimmed, merged = torch.randn(2, 4000, generator=generator)
    trimmed[:400], merged[200:600] = 0.0, 0.0
    rules = evidence.ablations
    both = decouple(trimmed, merged, mask_scale=0.8)
    alone = (
        rules.without_congruence(trimmed, merged, 0.8),
        rules.without_significance(trimmed, merged, 0.8),
    )
    assert torch.equal(both, alone[0] & alone[1])
    assert all(int(mask.sum()) > int(both.sum()) for mask in alone)
    nearest = rules.euclidean(trimmed, merged, 0.8)
    for index in range(0, 4000, 7):
        t, m = float(trimmed[index]), float(merged[index])
        assert bool(nearest[index]) == (m != 0 and (m - t) ** 2 <= t**2)
    assert torch.equal(nearest, decouple(trimmed, merged, mask_scale=1.0))


def test_jobs_come_in_the_order_in_which_they_matter(evidence: Any) -> None:
    available = {
        "base",
        "image",
        "audio",
        "video",
        "point",
        "image_new",
        "audio_new",
        *(f"twins/{m}" for m in ("image", "audio", "video", "point")),
    }
    jobs = evidence.tables.Jobs(available, mmer={}, tall={}, labelled={}).make()
    tables = list(dict.fromkeys(job.table for job in jobs))
    assert tables[:4] == ["retention", "expansion", "ablations", "text tokens"]
    assert set(tables[4:]) == {
        "calibration",
        "forgetting, 1 new",
        "forgetting, 2 new",
        "number of experts",
        "variants",
        "language",
        "density × mask scale",
    }
    methods = {job.recipe["method"] for job in jobs}
    named = {
        "naive_mc",
        "task_arithmetic",
        "ties",
        "dare_ties",
        "pcb",
        "consensus",
        "emr",
        "tall_masks",
        "optmerge",
        "swudi",
        "damc",
        "mmer",
    }
    assert methods >= named | {"neuron_fusion", "breadcrumbs", "della", "dare_linear"}


def test_a_small_part_of_the_page_is_measured_and_a_second_run_repeats_nothing(
    evidence: Any, tmp_path: Path
) -> None:
    sizes = evidence.sets.Sizes(single=9, mixed=9, share=4, new=4, many_single=9, many_mixed=9)
    place = evidence.measure.Place(
        str(ROOT / "examples" / "lab" / "checkpoints"), str(tmp_path), sizes, seeds=(7,)
    )
    available = {"base", "image", "audio"}
    place = evidence.reproduce.replace(
        place, embeddings=evidence.reproduce.encode_all(place, available)
    )
    jobs = evidence.tables.Jobs(available, mmer={}, tall={}, labelled={}).make()
    chosen = [
        job
        for job in jobs
        if job.table in ("retention", "ablations")
        and job.method in ("original", "MMER", "Euclidean distance", "λ = 1")
    ]
    measured = list(evidence.measure.measure_all(chosen, place, workers=1, seconds=600))
    assert len(measured) == len(chosen) == 13
    rows = evidence.rows.make_rows(measured)
    originals = [row for row in rows if row.table == "retention" and row.method == "original"]
    assert len(originals) == 18
    assert sum(row.value for row in originals) / len(originals) > 0.8
    by = {(row.method, row.group, row.task): row.value for row in rows if row.table == "ablations"}
    assert all(
        value == by[("λ = 1", group, task)]
        for (method, group, task), value in by.items()
        if method == "Euclidean distance"
    )
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()}
    again = list(evidence.measure.measure_all(chosen, place, workers=1, seconds=0))
    assert evidence.rows.make_rows(again) == rows
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").iterdir()} == stamps
    evidence.page.write_page(
        tmp_path / "docs",
        rows,
        missing=["x: y"],
        place=place,
        scales=evidence.calibration.Scales(),
        changes=evidence.changes.Changes(),
        effort=evidence.measure.Effort(3600, 600, 360, 2),
    )
    text = (tmp_path / "docs" / "reproduction.md").read_text()
    kept = evidence.rows.summarise(
        [row for row in rows if row.table == "retention" and row.method == "MMER"],
        value="performance_retention",
    )
    assert f"| {kept} | 99.8 / 99.4 |" in text
    assert "Not measured in this run." in text
    assert "- x: y" in text
    assert "60 minutes of processor time in all; 10 of them in this run" in text
    assert (
        "all of them in this run: 31 minutes of wall time"
        in evidence.measure.Effort(3600, 3600, 1860, 2).describe()
    )


def test_differences_are_paired_by_set_task_and_seed(evidence: Any) -> None:
    def row(method: str, task: str, value: float) -> Any:
        return evidence.rows.Row(
            "calibration", method, task, 7, "accuracy", value, None, "many mix/a+b"
        )

    values = {"x": (0.5, 0.4), "y": (0.9, 0.7), "z": (0.2, 0.2)}
    rows = [
        row(method, task, pair[place])
        for task, pair in values.items()
        for place, method in enumerate(("a", "b"))
    ]
    difference = evidence.rows.compare([*rows, row("a", "only here", 0.0)], "a", "b")
    assert difference.num_pairs == 3
    assert difference.mean == pytest.approx(0.1)
    assert difference.standard_error == pytest.approx(0.1 / 3**0.5)
    assert evidence.rows.compare(rows, "a", "b", value="performance_retention") is None


def test_what_masks_keep_is_what_a_loop_over_entries_finds(evidence: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = list(torch.randn(3, 500, generator=generator))
    trimmed = evidence.changes._trim(deltas)
    assert [int((values != 0).sum()) for values in trimmed] == [
        400 + 1
    ] * 3  # entries from ascending rank N − int(0.8·N) on
    merged = torch.randn(500, generator=generator)
    kept, norms = evidence.changes.find_kept(deltas, merged, [0.75] * 3)
    inside = opposite = 0
    squares = 0.0
    for delta, trimmed_value, value in zip(
        deltas[1].tolist(), trimmed[1].tolist(), merged.tolist(), strict=True
    ):
        is_kept = abs(trimmed_value) >= 0.375 * abs(value)
        inside += is_kept
        opposite += is_kept and trimmed_value * value <= 0
        squares += ((value if is_kept else 0.0) - delta) ** 2
    mask = kept[1]["without directional congruence"]
    assert mask.density == pytest.approx(inside / 500)
    assert mask.opposite == pytest.approx(opposite / inside)
    assert mask.distance == pytest.approx(squares**0.5 / float(deltas[1].norm()), rel=1e-5)
    assert all(by_rule["MMER"].opposite == 0 for by_rule in kept)
    assert norms["MMER"] < norms["without directional congruence"] < 1


def test_text_tokens_run_through_the_other_models_weights_and_media_tokens_through_the_first_ones(
    evidence: Any, tmp_path: Path
) -> None:
    place = evidence.measure.Place(str(ROOT / "examples" / "lab" / "checkpoints"), str(tmp_path))
    experts = evidence.tables.experts_of(("image", "audio"))
    recipes = [{"method": method, "experts": experts} for method in ("mmer", "ties")]
    plain, text_model = (
        evidence.measure.open_job(evidence.measure.Job("", "", recipe, ()), place)
        for recipe in recipes
    )
    mixed = evidence.measure.open_job(
        evidence.measure.Job("", "", recipes[0], (), text=recipes[1]), place
    )
    layers = [
        model.language_model.model.layers[0].mlp.up_proj for model in (plain, text_model, mixed)
    ]
    assert torch.equal(layers[2].weight, layers[1].weight)
    assert not torch.equal(layers[0].weight, layers[1].weight)
    assert all(
        torch.equal(layers[2].modality_weight(index), layers[0].modality_weight(index))
        for index in range(2)
    )


def test_the_committed_figures_have_all_their_fields() -> None:
    rows = json.loads((ROOT / "docs" / "reproduction.json").read_text())
    assert rows
    for row in rows:
        assert row.keys() >= KEYS
        assert 0 <= row["value"] <= 1
        assert row["performance_retention"] is None or row["performance_retention"] >= 0
    assert {row["seed"] for row in rows} == {7, 8, 9}
