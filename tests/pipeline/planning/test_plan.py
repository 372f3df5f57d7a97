from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mmerge.manifests.errors import CheckpointError, ShapeMismatch
from mmerge.pipeline import make_plan, read_recipe
from mmerge.pipeline.views.plan_report import plan_to_json


def plan_of(lab: Any, **changes: Any) -> Any:
    return make_plan(read_recipe(lab.write_recipe(lab.make_all() | changes)))


def test_shards_are_layers_and_bytes_are_those_of_the_files(lab: Any) -> None:
    plan = plan_of(lab)
    assert [shard.name for shard in plan.merge_shards] == [
        "embed_tokens",
        "layers.0",
        "layers.1",
        "lm_head",
        "norm",
    ]
    data = {
        name: sum(t.numel() * t.element_size() for t in tensors.values())
        for name, tensors in {
            "base": lab.base,
            **{str(seed): lab.expert_tensors(seed) for seed in range(3)},
        }.items()
    }
    assert plan.bytes_in == sum(data.values())
    assert plan.num_parameters == sum(tensor.numel() for tensor in lab.base.values())


def test_the_same_recipe_gives_the_same_plan_byte_for_byte(lab: Any) -> None:
    recipe = lab.write_recipe(lab.make_all())
    one, other = (json.dumps(plan_to_json(make_plan(read_recipe(recipe)))) for _ in range(2))
    assert one == other


def test_encoders_connectors_and_extra_rows_are_carried_and_nothing_else(lab: Any) -> None:
    carried = plan_to_json(plan_of(lab))["copied"]["image"]
    assert {(tensor["name"], tensor["role"], tuple(tensor["shape"])) for tensor in carried} == {
        ("multi_modal_projector.linear_1.weight", "carried", (16, 8)),
        ("vision_tower.embeddings.position_ids", "carried", (9,)),
        ("model.embed_tokens.weight", "extra_rows", (2, 16)),
        ("lm_head.weight", "extra_rows", (2, 16)),
    }


@pytest.mark.parametrize(
    ("base_to_expert", "head"),
    [
        ({"model.": "language_model.model."}, "language_model.lm_head.weight"),
        ({"model.": "model.language_model."}, "lm_head.weight"),
        ({"model.": "model.text_model."}, "lm_head.weight"),
        ({"model.": "model."}, "lm_head.weight"),
    ],
)
def test_every_layout_of_transformers_is_understood(
    lab: Any, base_to_expert: dict[str, str], head: str
) -> None:
    lab.make_base()
    ((before, after),) = base_to_expert.items()
    tensors = {
        (head if name == "lm_head.weight" else after + name[len(before) :]): value + 1
        for name, value in lab.base.items()
    }
    # An encoder with layers of the same names must not be taken for the language model.
    tensors |= {
        "vision." + name.removeprefix("model."): value
        for name, value in lab.base.items()
        if ".self_attn." in name
    }
    lab.write("image", tensors, lab.expert_config())
    raw = {
        "base": "base",
        "method": "ties",
        "output": "s",
        "experts": {"image": {"path": "image", "modality": "image"}},
    }
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    assert plan.num_parameters == sum(tensor.numel() for tensor in lab.base.values())
    assert {
        tensor.name.split(".")[0] for shard in plan.carry_shards for tensor in shard.tensors
    } == {"vision"}


def test_merge_linear_takes_the_projections_only(lab: Any) -> None:
    plan = plan_of(lab, merge="linear")
    names = {tensor.name for shard in plan.merge_shards for tensor in shard.tensors}
    assert {name.split(".")[-2] for name in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_a_layer_or_tensor_that_is_too_large_is_split(lab: Any) -> None:
    recipe = read_recipe(lab.write_recipe(lab.make_all()))
    plan = make_plan(recipe, max_shard_bytes=300)
    for shard in plan.merge_shards:
        assert sum(tensor.base.spec.num_bytes for tensor in shard.tensors) <= 300
        assert len({tensor.name for tensor in shard.tensors}) == len(shard.tensors)
    rows: dict[str, list[tuple[int, int]]] = {}
    for shard in plan.merge_shards:
        for tensor in shard.tensors:
            rows.setdefault(tensor.name, []).append((tensor.row_start, tensor.row_stop))
    for name, ranges in rows.items():
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])], name
        assert ranges[-1][1] == lab.base[name].shape[0]


def test_a_different_shape_is_named_with_both_sides(lab: Any) -> None:
    raw = lab.make_all()
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors.update({name: torch.zeros(24, 17)}))
    with pytest.raises(
        ShapeMismatch,
        match=(
            r"layers\.1\.mlp\.up_proj\.weight: expert 'audio' has \(24, 17\), the base has \(24,"
            r" 16\)"
        ),
    ):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_fewer_vocabulary_rows_than_the_base_are_refused(lab: Any) -> None:
    raw = lab.make_all()
    name = "language_model.model.embed_tokens.weight"
    lab.make_expert("audio", 1, change=lambda tensors: tensors.update({name: torch.zeros(39, 16)}))
    with pytest.raises(
        ShapeMismatch,
        match=r"embed_tokens\.weight: expert 'audio' has \(39, 16\), the base has \(40, 16\)",
    ):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_a_tensor_listed_under_carry_may_differ_and_a_pattern_without_effect_is_refused(
    lab: Any,
) -> None:
    raw = lab.make_all()
    lab.make_expert(
        "audio",
        1,
        change=lambda tensors: tensors.update(
            {"language_model.model.norm.weight": torch.zeros(17)}
        ),
    )
    plan = make_plan(read_recipe(lab.write_recipe(raw | {"carry": ["model.norm.*"]})))
    assert "model.norm.weight" not in {
        tensor.name for shard in plan.merge_shards for tensor in shard.tensors
    }
    with pytest.raises(CheckpointError, match=r"carry: 'nothing\*' matches no tensor"):
        make_plan(read_recipe(lab.write_recipe(raw | {"carry": ["model.norm.*", "nothing*"]})))


def test_an_expert_of_another_architecture_is_refused(lab: Any) -> None:
    raw = lab.make_all()
    config = lab.expert_config()
    config["text_config"] = lab.config | {"num_hidden_layers": 3}
    (lab.folder / "audio" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_hidden_layers 3, the base has 2"):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_differences_in_how_language_models_compute_are_warnings(lab: Any) -> None:
    raw = lab.make_all()
    config = lab.expert_config()
    config["text_config"] = lab.config | {
        "model_type": "mistral",
        "rms_norm_eps": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
    }
    (lab.folder / "audio" / "config.json").write_text(json.dumps(config))
    plan = make_plan(read_recipe(lab.write_recipe(raw)))
    text = "\n".join(plan.warnings)
    assert "expert 'audio': its language model is of type 'mistral', the base of type" in text
    assert "expert 'audio': rms_norm_eps is 0.5, in the base" in text
    assert "expert 'audio': rope: rope_theta is 77.0, in the base" in text
    assert "'image'" not in text
    assert plan_to_json(plan)["warnings"] == list(plan.warnings)


def test_null_in_a_configuration_means_the_default_of_the_class(lab: Any) -> None:
    raw = lab.make_all()
    config = lab.expert_config()
    heads, hidden = lab.config["num_attention_heads"], lab.config["hidden_size"]
    config["text_config"] = lab.config | {"head_dim": hidden // heads}
    (lab.folder / "audio" / "config.json").write_text(json.dumps(config))
    base = lab.config | {"head_dim": None}
    (lab.folder / "base" / "config.json").write_text(json.dumps(base))
    make_plan(read_recipe(lab.write_recipe(raw)))
    config["text_config"] = lab.config | {"head_dim": 2 * hidden // heads}
    (lab.folder / "audio" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"head_dim {2 * hidden // heads}, the base has"):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_an_expert_that_lacks_a_tensor_or_a_language_model_is_refused(lab: Any) -> None:
    raw = lab.make_all()
    lab.make_expert(
        "audio", 1, change=lambda tensors: tensors.pop("language_model.model.norm.weight")
    )
    with pytest.raises(
        CheckpointError,
        match=r"model\.norm\.weight: expert 'audio' has no language_model\.model\.norm\.weight",
    ):
        make_plan(read_recipe(lab.write_recipe(raw)))
    lab.write("audio", {"x": torch.zeros(2)}, lab.expert_config())
    with pytest.raises(
        CheckpointError, match=r"expert 'audio': .* has no tensor named \*embed_tokens\.weight"
    ):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_missing_files_and_folders_are_named(lab: Any) -> None:
    raw = lab.make_all()
    (lab.folder / "audio" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"expert 'audio': .*has none of model.safetensors, "):
        make_plan(read_recipe(lab.write_recipe(raw)))
    (lab.folder / "audio" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expert 'audio': .*config\.json: no such file"):
        make_plan(read_recipe(lab.write_recipe(raw)))
    raw["base"] = "nowhere"
    with pytest.raises(CheckpointError, match=r"base: .*nowhere: no such folder"):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_a_truncated_file_and_a_giant_header_are_refused_without_reading_them(lab: Any) -> None:
    raw = lab.make_all()
    path = lab.folder / "audio" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"expert 'audio': .*truncated"):
        make_plan(read_recipe(lab.write_recipe(raw)))
    path.write_bytes(struct.pack("<Q", 1 << 60) + data[8:])
    with pytest.raises(CheckpointError, match="announces a header of"):
        make_plan(read_recipe(lab.write_recipe(raw)))


@pytest.mark.parametrize(
    "file", ["../base/model.safetensors", "/etc/passwd", "a/b.safetensors", ".."]
)
def test_an_index_cannot_point_out_of_its_folder(lab: Any, file: str) -> None:
    raw = lab.make_all()
    index = {"weight_map": {"language_model.model.norm.weight": file}}
    (lab.folder / "audio" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="only files in the same folder are read"):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_a_checkpoint_of_several_files_is_read_through_its_index(lab: Any) -> None:
    raw = lab.make_all()
    whole = make_plan(read_recipe(lab.write_recipe(raw)))
    folder: Path = lab.folder / "audio"
    names = sorted(lab.expert_tensors(1))
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index}.safetensors"
        save_file({name: lab.expert_tensors(1)[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    parts = make_plan(read_recipe(lab.write_recipe(raw)))
    assert (parts.bytes_in, parts.bytes_out, parts.num_parameters) == (
        whole.bytes_in,
        whole.bytes_out,
        whole.num_parameters,
    )
