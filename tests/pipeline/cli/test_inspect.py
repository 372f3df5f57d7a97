from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmerge.pipeline.cli.main import app


def inspect(*words: object) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["inspect", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_a_multimodal_checkpoint_is_described(lab: Any) -> None:
    lab.make_all()
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
    (lab.folder / "image" / "tokenizer.json").write_text(json.dumps(vocabulary))
    document = inspect(lab.folder / "image")
    rows = lab.base["model.embed_tokens.weight"].shape[0]
    assert document["family"] == "llama"
    assert document["language_prefix"] == "language_model.model."
    assert document["vocabulary_rows"] == rows + 2
    assert document["tokenizer_tokens"] == 2
    assert document["quantization"] == ""
    assert {group["prefix"] for group in document["groups"]} == {
        "multi_modal_projector",
        "vision_tower",
    }
    assert document["comparison"] is None


def test_all_differences_from_a_base_are_listed_and_it_merges(lab: Any) -> None:
    lab.make_all()
    comparison = inspect(lab.folder / "image", "--base", lab.folder / "base")["comparison"]
    assert comparison["merges"] is True
    kinds = {(line["kind"], line["subject"]) for line in comparison["differences"]}
    assert ("shape", "model.embed_tokens.weight") in kinds
    assert ("in the checkpoint alone", "vision_tower") in kinds


def test_a_checkpoint_that_does_not_merge_is_told_with_the_error_of_the_plan(lab: Any) -> None:
    lab.make_all()
    path = lab.folder / "image" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_hidden_layers"] = 7
    path.write_text(json.dumps(config))
    comparison = inspect(lab.folder / "image", "--base", lab.folder / "base")["comparison"]
    assert comparison["merges"] is False
    assert "num_hidden_layers 7, the base has 2" in comparison["refusal"]
    assert comparison["merge"] is None
    size = {"kind": "configuration", "subject": "num_hidden_layers", "base": "2", "checkpoint": "7"}
    assert size in comparison["differences"]


def test_every_kind_of_difference_is_a_row_with_both_values(lab: Any) -> None:
    lab.make_all()
    for name, words in (("base", "abc"), ("image", "acb")):
        vocabulary = {"model": {"vocab": {word: i for i, word in enumerate(words)}}}
        (lab.folder / name / "tokenizer.json").write_text(json.dumps(vocabulary))
    (lab.folder / "image" / "chat_template.jinja").write_text("one")
    path = lab.folder / "image" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {"rms_norm_eps": 0.5, "hidden_act": "gelu", "rope_theta": 7.0}
    path.write_text(json.dumps(config))
    comparison = inspect(lab.folder / "image", "--base", lab.folder / "base")["comparison"]
    rows = {
        (line["kind"], line["subject"]): (line["base"], line["checkpoint"])
        for line in comparison["differences"]
    }
    assert rows["token", "id 1"] == ("'b'", "'c'")
    assert rows["configuration", "rms_norm_eps"][1] == "0.5"
    assert rows["configuration", "hidden_act"][1] == "'gelu'"
    assert rows["configuration", "rope: rope_theta"][1] == "7.0"
    assert rows["checkpoint", "chat template"][0] == "none"
    assert rows["checkpoint", "class"][0] == "LlamaForCausalLM"
    merge = comparison["merge"]
    assert merge["num_merged"] == len(lab.base)
    assert merge["num_copied"] > 0
    assert merge["num_added_rows"] == 2
    assert ["model.", "language_model.model."] in merge["renames"]


def test_a_quantised_checkpoint_is_named_and_not_refused(lab: Any) -> None:
    lab.make_base()
    path = lab.folder / "base" / "config.json"
    path.write_text(json.dumps(lab.config | {"quantization_config": {"quant_method": "awq"}}))
    document = inspect(lab.folder / "base")
    assert "awq" in document["quantization"].lower()
    assert document["problems"]


def test_an_adapter_is_described_by_rank_and_modules_and_compared(lab: Any) -> None:
    lab.make_base()
    folder = lab.folder / "adapter"
    folder.mkdir()
    weight = lab.base["model.layers.0.mlp.up_proj.weight"]
    path = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {
        f"{path}.lora_A.weight": torch.ones(3, weight.shape[1]),
        f"{path}.lora_B.weight": torch.ones(weight.shape[0], 3),
    }
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    document = inspect(folder, "--base", lab.folder / "base")
    assert document["adapters"] == [
        {"name": "default", "ranks": [3], "num_modules": 1, "modules": ["up_proj"]}
    ]
    assert document["comparison"]["merges"] is True


def test_the_printed_form_names_what_was_found(lab: Any) -> None:
    lab.make_all()
    words = ["inspect", str(lab.folder / "image"), "--base", str(lab.folder / "base")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    for text in (
        "llama",
        "language_model.model.…",
        "vision_tower",
        "merges with",
        "shape",
        "tensors merged",
    ):
        assert text in result.output
