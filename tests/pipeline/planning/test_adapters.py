"""A LoRA adapter is an expert like any other: formed block by block, the same bytes whatever the
blocks, and written back.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_adapters import PREFIX, build, delta_of, experts, make_float32_base, write_adapter
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmerge.manifests.errors import (
    CheckpointError,
    ManifestError,
    MmergeError,
    RecipeError,
    ShapeMismatch,
)
from mmerge.pipeline import make_plan, read_recipe
from mmerge.pipeline.cli.main import app
from mmerge.pipeline.evaluation.answers import read_answers
from mmerge.workers.checkpoints.lora_weights import low_rank_rows
from mmerge.workers.exports.lora import export_adapter
from mmerge.workers.exports.lora_average import write_average
from mmerge.workers.reconstruction.weights import text_weight


@pytest.fixture
def raw(lab: Any) -> dict[str, Any]:
    return make_float32_base(lab)


def test_the_task_vector_of_an_adapter_is_its_product(lab: Any, raw: dict[str, Any]) -> None:
    one = write_adapter(lab, "one", seed=1)
    two = write_adapter(lab, "two", seed=2, rank=3, use_rslora=True)
    reader = build(lab, raw | {"experts": experts("one", "two")})
    for name, base in lab.base.items():
        expected = base + delta_of(one, name, 8 / 4) + delta_of(two, name, 8 / math.sqrt(3))
        torch.testing.assert_close(text_weight(reader, name), expected, rtol=1e-5, atol=1e-5)


def test_patterns_give_a_linear_its_own_rank_and_alpha(lab: Any, raw: dict[str, Any]) -> None:
    factors = write_adapter(
        lab,
        "one",
        seed=1,
        rank=2,
        r=4,
        rank_pattern={"q_proj|k_proj|gate_proj|down_proj": 2},
        alpha_pattern={"mlp.gate_proj": 32, "q_proj": 0},
    )
    reader = build(lab, raw | {"experts": experts("one")})
    for name, scale in (
        ("model.layers.0.mlp.gate_proj.weight", 16.0),
        ("model.layers.1.mlp.down_proj.weight", 4.0),
        ("model.layers.0.self_attn.q_proj.weight", 0.0),
    ):
        torch.testing.assert_close(
            text_weight(reader, name),
            lab.base[name] + delta_of(factors, name, scale),
            rtol=1e-5,
            atol=1e-5,
        )


def test_a_pickled_adapter_gives_the_same_objects_as_safetensors(
    lab: Any, raw: dict[str, Any]
) -> None:
    write_adapter(lab, "one", seed=1)
    first = build(lab, raw | {"experts": experts("one")})
    (lab.folder / "one" / "adapter_model.safetensors").unlink()
    write_adapter(lab, "one", seed=1, pickled=True)
    second = build(lab, raw | {"experts": experts("one"), "output": "again"})
    assert [entry.digest for entry in first.manifest.entries] == [
        entry.digest for entry in second.manifest.entries
    ]


@pytest.mark.parametrize("row_start", [0, 1, 7, 8, 13])
def test_rows_of_a_product_are_the_same_bits_however_they_are_asked_for(row_start: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(16, 300, generator=generator), torch.randn(45, 16, generator=generator)
    whole = low_rank_rows(a, b, scale=0.7, row_start=0, row_stop=45)
    torch.testing.assert_close(whole, 0.7 * b @ a)
    for row_stop in (row_start + 1, row_start + 20, 45):
        assert torch.equal(
            low_rank_rows(a, b, scale=0.7, row_start=row_start, row_stop=row_stop),
            whole[row_start:row_stop],
        )


def test_blocks_pieces_and_threads_do_not_change_a_build_of_adapters(
    lab: Any, raw: dict[str, Any]
) -> None:
    lab.config |= {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "vocab_size": 300}
    lab.make_base()
    write_adapter(lab, "one", seed=1)
    write_adapter(lab, "two", seed=2, rank=5)
    recipe = raw | {"method": "ties", "density": 0.4, "experts": experts("one", "two")}
    found = []
    for output, block_entries, max_shard_bytes, threads in (
        ("a", 1 << 18, 1 << 31, 1),
        ("b", 1 << 16, 1 << 31, 2),
        ("c", 1 << 16, 90_000, 1),
    ):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        reader = build(
            lab,
            recipe | {"output": output},
            block_entries=block_entries,
            max_shard_bytes=max_shard_bytes,
        )
        torch.set_num_threads(before)
        found.append({name: text_weight(reader, name) for name in lab.base})
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in lab.base)


def test_tensors_that_an_adapter_saves_whole_replace_the_bases(
    lab: Any, raw: dict[str, Any]
) -> None:
    head = torch.randn(40, 16)
    write_adapter(
        lab,
        "one",
        seed=1,
        more={f"{PREFIX}lm_head.weight": head, f"{PREFIX}vision.connector.weight": torch.ones(3)},
    )
    reader = build(lab, raw | {"experts": experts("one")})
    torch.testing.assert_close(text_weight(reader, "lm_head.weight"), head)
    assert reader.names("carried", "one") == ["vision.connector.weight"]


def test_an_adapter_trained_on_a_multimodal_model_fits_the_base_of_its_language_model(
    lab: Any, raw: dict[str, Any]
) -> None:
    factors = write_adapter(lab, "one", seed=1)
    moved = {
        name.replace("model.layers", "model.language_model.layers").replace(
            f"{PREFIX}model.model.", f"{PREFIX}model."
        ): value
        for name, value in factors.items()
    }
    save_file(moved, lab.folder / "one" / "adapter_model.safetensors")
    reader = build(lab, raw | {"experts": experts("one")})
    name = "model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(
        text_weight(reader, name),
        lab.base[name] + delta_of(factors, name, 2.0),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_task_states_the_memory_that_forming_an_adapter_takes(
    lab: Any, raw: dict[str, Any]
) -> None:
    write_adapter(lab, "one", seed=1, rank=1000)
    small = make_plan(read_recipe(lab.write_recipe(raw | {"experts": experts("one")}))).peak_bytes
    write_adapter(lab, "one", seed=1, rank=3000)
    large = make_plan(read_recipe(lab.write_recipe(raw | {"experts": experts("one")}))).peak_bytes
    # Both factors of down_proj, [rank, 24] and [16, rank], as read (float32) and widened.
    assert large - small == 8 * (3000 - 1000) * (24 + 16)


def test_a_merge_of_adapters_written_as_one_of_the_sum_of_their_ranks_is_whole(
    lab: Any, raw: dict[str, Any]
) -> None:
    write_adapter(lab, "one", seed=1, rank=2)
    write_adapter(lab, "two", seed=2, rank=3)
    reader = build(lab, raw | {"experts": experts("one", "two")})
    uri, base = str(lab.folder / "store"), str(lab.folder / "base")
    report = export_adapter(uri, lab.folder / "written", rank=5, base=base)
    assert (report.num_matrices, report.left_out) == (8, [])
    assert report.residual < 1e-5
    again = build(lab, raw | {"experts": experts("written"), "output": "again"})
    for name in lab.base:
        torch.testing.assert_close(
            text_weight(again, name), text_weight(reader, name), rtol=1e-4, atol=1e-4
        )
    config = json.loads((lab.folder / "written" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 5, 5)
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "q_proj"]
    residuals = [
        export_adapter(uri, lab.folder / f"rank{rank}", rank=rank, base=base).residual
        for rank in (1, 2, 4)
    ]
    assert residuals == sorted(residuals, reverse=True)
    assert residuals[-1] > 0.01


def test_the_truncation_to_an_adapter_is_the_best_of_its_rank(
    lab: Any, raw: dict[str, Any]
) -> None:
    lab.make_expert("whole", 3)
    reader = build(
        lab, raw | {"experts": {"whole": {"path": "whole", "modality": "image"}}, "merge": "linear"}
    )
    export_adapter(
        str(lab.folder / "store"), lab.folder / "written", rank=3, base=str(lab.folder / "base")
    )
    factors = load_file(lab.folder / "written" / "adapter_model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    delta = text_weight(reader, f"{name}.weight") - lab.base[f"{name}.weight"]
    missed = (
        delta - factors[f"{PREFIX}{name}.lora_B.weight"] @ factors[f"{PREFIX}{name}.lora_A.weight"]
    )
    assert float(missed.norm()) == pytest.approx(
        float(torch.linalg.svdvals(delta)[3:].norm()), rel=1e-4
    )


def test_the_command_line_writes_an_adapter_and_says_what_it_lacks(
    lab: Any, raw: dict[str, Any]
) -> None:
    lab.make_expert("whole", 3)
    build(lab, raw | {"experts": {"whole": {"path": "whole", "modality": "image"}}})
    store, written = str(lab.folder / "store"), str(lab.folder / "written")
    done = CliRunner().invoke(
        app,
        ["export", store, "--to", written, "--lora-rank", "4", "--base", str(lab.folder / "base")],
    )
    assert done.exit_code == 0, done.output
    assert "14 matrices" in done.output
    assert "model.embed_tokens.weight" in done.output
    with pytest.raises(ManifestError, match="--base"):
        export_adapter(store, lab.folder / "other", rank=4)


@pytest.mark.parametrize(
    ("config", "more", "error", "message"),
    [
        ({"use_dora": True}, {}, CheckpointError, "has no lora_magnitude_vector"),
        ({"peft_type": "IA3"}, {}, CheckpointError, "IA3"),
        ({"r": 16}, {}, CheckpointError, "says rank 16, the factors have 4"),
        ({"lora_alpha": None}, {}, CheckpointError, "no lora_alpha"),
        ({"lora_alpha": float("inf")}, {}, CheckpointError, "no lora_alpha that is a number"),
        (
            {},
            {f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.zeros(2, 40)},
            CheckpointError,
            "has only lora_embedding_A",
        ),
        (
            {},
            {f"{PREFIX}model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 16)},
            CheckpointError,
            "has only lora_A",
        ),
        (
            {},
            {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 15)},
            ShapeMismatch,
            r"has an adapter for \(16, 15\), the base has \(16, 16\)",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_its_reason(
    lab: Any,
    raw: dict[str, Any],
    config: dict[str, Any],
    more: dict[str, Any],
    error: type[MmergeError],
    message: str,
) -> None:
    write_adapter(lab, "one", seed=1, more=more, **config)
    with pytest.raises(error, match=message):
        make_plan(read_recipe(lab.write_recipe(raw | {"experts": experts("one")})))


def test_an_adapter_of_another_model_is_refused(lab: Any, raw: dict[str, Any]) -> None:
    write_adapter(lab, "one", seed=1)
    factors = load_file(lab.folder / "one" / "adapter_model.safetensors")
    save_file(
        {name.replace("layers", "blocks"): value for name, value in factors.items()},
        lab.folder / "one" / "adapter_model.safetensors",
    )
    with pytest.raises(CheckpointError, match="no adapter fits a Linear layer of the base"):
        make_plan(read_recipe(lab.write_recipe(raw | {"experts": experts("one")})))


def test_factors_are_averaged_only_between_equal_ranks(lab: Any, raw: dict[str, Any]) -> None:
    one, two = write_adapter(lab, "one", seed=1), write_adapter(lab, "two", seed=2)
    write_adapter(lab, "three", seed=3, rank=5)
    folders = [str(lab.folder / name) for name in ("one", "two", "three")]
    with pytest.raises(
        ShapeMismatch, match=r"adapter 2 has \(5, 24\), adapter 1 has \(4, 24\).*equal"
    ):
        write_average(
            [folders[0], folders[2]], lab.folder / "written", strategy="mean", density=0.2
        )
    assert write_average(folders[:2], lab.folder / "written", strategy="mean", density=0.2) == 16
    reader = build(lab, raw | {"experts": experts("written")})
    name = "model.layers.0.mlp.gate_proj"
    a, b = (
        (one[f"{PREFIX}{name}.lora_{part}.weight"] + two[f"{PREFIX}{name}.lora_{part}.weight"]) / 2
        for part in "AB"
    )
    torch.testing.assert_close(
        text_weight(reader, f"{name}.weight"),
        lab.base[f"{name}.weight"] + 2 * b @ a,
        rtol=1e-4,
        atol=1e-5,
    )


def test_answers_are_read_and_a_coefficient_chosen_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps({"0.0": ["a", "b"], "0.1": ["c", "d"], "0.2": ["C", "e"]}))
    done = CliRunner().invoke(app, ["choose-alpha", str(path), "--json"])
    assert json.loads(done.output) == {
        "alphas": [0.0, 0.1, 0.2],
        "differences": [2, 1],
        "best": [0.2],
        "alpha": 0.2,
    }
    path.write_text(json.dumps({"0.0": ["a", "b"], "0.1": ["c"]}))
    with pytest.raises(RecipeError, match="the same questions"):
        read_answers(path)
