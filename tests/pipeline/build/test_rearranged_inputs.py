"""Builds of models that are put together: sliced layers, rows by token, merged adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmerge.manifests.errors import CheckpointError, MmergeError, RecipeError
from mmerge.pipeline import export, load_composite, make_plan, read_recipe, run
from mmerge.pipeline.execution.jobs import to_absolute
from mmerge.pipeline.views.plan_report import plan_to_json
from mmerge.workers.checkpoints.checkpoint import Checkpoint
from tests.published_yamls import HIDDEN, TOKENS, make_models

Q_PROJ = "self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


def write(models: Path, name: str, **keys: Any) -> Path:
    path = models / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"output": f"store-{name}", **keys}))
    return path


def build(models: Path, name: str, **keys: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Run a recipe, and return its store and the exported tensors."""
    run(make_plan(read_recipe(write(models, name, **keys))))
    export(str(models / f"store-{name}"), models / f"export-{name}")
    return str(models / f"store-{name}"), load_file(models / f"export-{name}/model.safetensors")


def tensors(models: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(models / name / "model.safetensors")


def expert(path: str, **keys: Any) -> dict[str, Any]:
    return {"path": path, "modality": "text", **keys}


STACK = {
    "method": "linear",
    "normalize": False,
    "dtype": "float32",
    "experts": {
        "stack": expert(
            "m1", weight=1.0, slices=[{"layers": [0, 2]}, {"path": "m2", "layers": [1, 3]}]
        )
    },
}


def test_a_stacked_build_is_verified_shown_and_answers_as_its_export(
    models: Path, cli: Callable[..., tuple[int, str]]
) -> None:
    from transformers import AutoModelForCausalLM

    store, merged = build(models, "stack", **STACK)
    first, second = tensors(models, "m1"), tensors(models, "m2")
    for layer, (source, number) in enumerate(
        [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]
    ):
        expected = source[f"model.layers.{number}.{Q_PROJ}"]
        assert merged[f"model.layers.{layer}.{Q_PROJ}"].equal(expected)
    assert merged["model.embed_tokens.weight"].equal(first["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        assert merged[name].equal(second[name])
    for command in ("verify", "show"):
        code, text = cli(command, store)
        assert code == 0, text
    composite = load_composite(store, dtype=torch.float32)
    ids = torch.tensor([[3, 4, 5]])
    model = AutoModelForCausalLM.from_pretrained(
        models / "export-stack", dtype=torch.float32, trust_remote_code=False
    )
    assert model.config.num_hidden_layers == 6
    prompt = composite.prompt("a b c")
    torch.testing.assert_close(
        composite.logits(prompt)[-1], model(ids).logits[0, -1], rtol=1e-4, atol=1e-4
    )


def test_an_object_follows_the_layers_it_is_made_of_and_not_their_numbers(models: Path) -> None:
    swapped = expert("m1", weight=1.0, slices=[{"layers": [1, 1]}, {"layers": [0, 3]}])
    plain = expert("m1", weight=1.0)
    keys = {key: value for key, value in STACK.items() if key != "experts"}
    output = {"output": "shared"}
    reports = [
        run(make_plan(read_recipe(write(models, name, **keys, **output, experts={"m1": item}))))
        for name, item in (("swapped", swapped), ("plain", plain))
    ]
    entries = [{entry.shard: entry.key for entry in report.manifest.entries} for report in reports]
    # Layer 1 of the first is layer 0 of both: its bytes are equal, its tensors' names are not.
    assert entries[0]["layers.1"] not in entries[1].values()
    assert reports[0].build != reports[1].build
    assert reports[0].manifest.experts[0].parameters["slices"] == [[1, 1], [0, 3]]
    assert "slices" not in reports[1].manifest.experts[0].parameters


def edit_config(models: Path, source: str, name: str, **changes: Any) -> None:
    """Write a copy of a model with another configuration."""
    folder = models / name
    folder.mkdir()
    for path in (models / source).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def stacked_config(models: Path, name: str, *ranges: tuple[int, int]) -> dict[str, Any]:
    slices = [{"layers": list(layers)} for layers in ranges]
    recipe = STACK | {"experts": {"stack": expert(name, weight=1.0, slices=slices)}}
    plan = make_plan(read_recipe(write(models, f"config-of-{name}", **recipe)))
    return plan.checkpoints[0].config


def test_lists_with_a_value_per_layer_follow_the_layers(models: Path) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    edit_config(models, "m1", "kinds", model_type="qwen2", layer_types=kinds, sliding_window=8)
    config = stacked_config(models, "kinds", (1, 2), (1, 1))
    assert config["layer_types"] == [kinds[1], kinds[2], kinds[1]]
    assert config["num_hidden_layers"] == 3
    # What the file leaves to its class is written out: it would follow from the new number.
    edit_config(
        models,
        "m1",
        "rule",
        model_type="qwen2",
        use_sliding_window=True,
        max_window_layers=2,
        sliding_window=8,
    )
    config = stacked_config(models, "rule", (2, 3), (0, 0))
    assert config["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


def test_layers_that_a_rule_would_give_another_kind_are_refused(models: Path) -> None:
    edit_config(models, "m1", "dense", first_k_dense_replace=1)
    assert stacked_config(models, "dense", (0, 2), (1, 3))["num_hidden_layers"] == 6
    with pytest.raises(CheckpointError, match=r"layer 0 of .*dense would become layer 2"):
        stacked_config(models, "dense", (0, 1), (0, 1))


@pytest.mark.parametrize(
    ("slices", "match"),
    [
        ([{"layers": [2, 4]}], r"m1 has 4 layers, 0 to 3; a slice asks for 2 to 4"),
        ([{"layers": [2, 1]}], r"slices\.0\.layers: expected the first and the last layer"),
        (
            [{"layers": [0, 1]}, {"path": "t2", "layers": [0, 1]}],
            "embedding and head of its slices do not fit .* Give a 'tokenizer'",
        ),
        (
            [{"layers": [0, 1]}, {"path": "wide", "layers": [0, 1]}],
            "hidden_size 16, the base has 8",
        ),
    ],
)
def test_slices_that_make_no_model_are_refused(
    models: Path, slices: list[dict[str, Any]], match: str
) -> None:
    if not (models / "wide").exists():
        edit_config(models, "m1", "wide", hidden_size=16)
    recipe = STACK | {"experts": {"stack": expert("m1", weight=1.0, slices=slices)}}
    with pytest.raises(MmergeError, match=match):
        make_plan(read_recipe(write(models, "refused", **recipe)))


def test_an_adapter_of_any_model_is_merged_into_it_first(models: Path) -> None:
    keys = {"method": "linear", "dtype": "float32", "base": None}
    experts = {"one": expert("m1", lora="lora"), "two": expert("m2")}
    _, merged = build(
        models, "adapted", **{key: value for key, value in keys.items() if value}, experts=experts
    )
    factors = load_file(models / "lora" / "adapter_model.safetensors")
    a, b = (next(value for key, value in factors.items() if letter in key) for letter in "AB")
    name = f"model.layers.0.{Q_PROJ}"
    adapted = tensors(models, "m1")[name] + 2 * b @ a
    torch.testing.assert_close(merged[name], (adapted + tensors(models, "m2")[name]) / 2)
    assert not (models / "export-adapted" / "adapter_config.json").exists()


def token_rows(models: Path, name: str) -> dict[str, torch.Tensor]:
    table = tensors(models, name)["model.embed_tokens.weight"]
    return {token: table[number] for number, token in enumerate(TOKENS[name])}


ARITHMETIC: dict[str, Any] = {
    "method": "task_arithmetic",
    "dtype": "float32",
    "base": "base",
    "experts": {"t1": expert("t1"), "t2": expert("t2", weight=0.5)},
}


def test_rows_are_matched_by_token_and_missing_ones_are_filled_in(models: Path) -> None:
    tokenizer = {
        "source": "union",
        "pad_to_multiple_of": 4,
        "tokens": {
            "a": {"source": "t2", "force": True},
            "new": {"source": {"model": "t2", "token": "c"}},
            "none": {"source": "zero"},
        },
    }
    _, merged = build(models, "rows", **ARITHMETIC, tokenizer=tokenizer)
    base, one, two = (token_rows(models, name) for name in ("base", "t1", "t2"))
    expected = {
        token: base[token] + (one[token] - base[token]) + 0.5 * (two[token] - base[token])
        for token in TOKENS["base"]
    }
    mean = (one["x"] + two["x"]) / 2
    expected["x"] = mean + (one["x"] - mean) + 0.5 * (two["x"] - mean)
    expected |= {"y": two["y"], "a": two["a"], "new": two["c"], "none": torch.zeros(HIDDEN)}
    table = merged["model.embed_tokens.weight"]
    assert table.shape == (12, HIDDEN)
    assert not table[11].any()
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(models / "export-rows", trust_remote_code=False)
    assert set(expected) == set(loaded.get_vocab())
    for token, row in expected.items():
        number = loaded.convert_tokens_to_ids(token)
        torch.testing.assert_close(table[number], row, msg=token)
        assert loaded(token, add_special_tokens=False)["input_ids"] == [number]
    config = json.loads((models / "export-rows" / "config.json").read_text())
    assert config["vocab_size"] == 12


def test_ids_of_a_configuration_follow_the_tokens(models: Path) -> None:
    edit_config(models, "t1", "ends", eos_token_id=[2, 3], image_token_id=7)
    (models / "ends" / "generation_config.json").write_text('{"eos_token_id": 3, "top_k": 3}')
    recipe = ARITHMETIC | {"base": "ends", "experts": {"t2": expert("t2")}}
    build(models, "ends", **recipe, tokenizer={"source": "t2"})
    # t2 says 6 to what is 3 in t1, and 8 to what is 7.
    config = json.loads((models / "export-ends" / "config.json").read_text())
    assert (config["eos_token_id"], config["image_token_id"]) == ([2, 6], 8)
    generation = json.loads((models / "export-ends" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 6, "top_k": 3}
    recipe = ARITHMETIC | {"experts": {"ends": expert("ends")}, "tokenizer": {}}
    path = write(models, "lacking", **recipe)
    with pytest.raises(CheckpointError, match="states image_token_id 7, the token 'x', which the"):
        make_plan(read_recipe(path))


def test_a_tokenizer_that_cannot_be_matched_is_refused(models: Path) -> None:
    edit_config(models, "t1", "mute")
    (models / "mute" / "tokenizer.json").unlink()
    edit_config(models, "base", "short")
    raw = json.loads((models / "t2" / "tokenizer.json").read_text())
    (models / "short" / "tokenizer.json").write_text(json.dumps(raw))
    for changes, match in [
        ({"base": "mute"}, "mute has no tokenizer.json"),
        ({"base": "short"}, r"token '\w' has id \d, and the embedding has 7 rows"),
        (
            {"tokenizer": {"source": "union", "tokens": {"q": {"source": "t2"}}}},
            "tokenizer.tokens.q: .*t2 has no token 'q'",
        ),
        (
            {"tokenizer": {"tokens": {"q": {"source": "t2"}}}},
            "base has no such token. Use 'source: union'",
        ),
        ({"tokenizer": {"source": "nowhere"}}, "nowhere: no such folder"),
        ({"experts": {"union": expert("t1")}}, "experts.union: the keys of 'tokenizer' mean"),
        (
            {"method": "mmer", "experts": {"t1": expert("t1")}},
            "tokenizer: is for methods that give one merged model",
        ),
        ({"tokenizer": {"tokens": {"a": {"source": {"model": "t2"}}}}}, "either 'token' or"),
    ]:
        recipe = ARITHMETIC | {"tokenizer": {"source": "union"}} | changes
        with pytest.raises(MmergeError, match=match):
            make_plan(read_recipe(write(models, "refused", **recipe)))


def test_kept_tensors_stay_the_bases(models: Path) -> None:
    recipe = ARITHMETIC | {"experts": {"m1": expert("m1")}}
    _, merged = build(models, "kept", **recipe, keep=["*mlp*"])
    base, one = tensors(models, "base"), tensors(models, "m1")
    for name, value in merged.items():
        torch.testing.assert_close(value, base[name] if "mlp" in name else one[name])
    path = write(models, "refused", **recipe, keep=["nothing"])
    with pytest.raises(CheckpointError, match="keep: 'nothing' matches no tensor"):
        make_plan(read_recipe(path))


def test_a_submitted_recipe_names_every_input_absolutely(models: Path) -> None:
    slices = [{"layers": [0, 1]}, {"path": "m2", "lora": "lora", "layers": [2, 3]}]
    tokens = {"a": {"source": {"model": "./t2", "token": "c"}}}
    recipe = ARITHMETIC | {
        "base_slices": slices,
        "base_lora": "lora",
        "experts": {"m1": expert("m1", lora="lora", slices=slices)},
        "tokenizer": {"source": "./t1", "tokens": tokens},
    }
    path = write(models, "submitted", **recipe)
    planned = read_recipe(path)
    moved = models / "elsewhere"
    moved.mkdir()
    (moved / "submitted.yaml").write_text(to_absolute(path, planned))
    assert read_recipe(moved / "submitted.yaml") == planned


def test_a_plan_shows_what_its_inputs_are_put_together_from(models: Path) -> None:
    recipe = STACK | {"tokenizer": {"source": "base"}, "chat_template": "chatml"}
    shown = plan_to_json(make_plan(read_recipe(write(models, "shown", **recipe))))
    assert [part["layers"] for part in shown["experts"]["stack"]["slices"]] == [[0, 2], [1, 3]]
    assert shown["tokenizer"] == {"source": "base"}
    assert shown["chat_template"].startswith("{% for message in messages %}")
    recipe |= {"chat_template": "alpaca"}
    with pytest.raises(RecipeError, match="chat_template: 'alpaca' is no name"):
        read_recipe(write(models, "shown", **recipe))


def test_an_input_that_is_put_together_is_watched_for_changes(models: Path) -> None:
    edit_config(models, "m2", "moving")
    slices = [{"layers": [0, 1]}, {"path": "moving", "layers": [2, 3]}]
    recipe = STACK | {"experts": {"stack": expert("m1", weight=1.0, slices=slices)}}
    path = write(models, "moving-stack", **recipe)
    first = run(make_plan(read_recipe(path)))
    weights = tensors(models, "moving")
    weights[f"model.layers.3.{Q_PROJ}"] += 1
    save_file(weights, models / "moving" / "model.safetensors", metadata={"format": "pt"})
    second = run(make_plan(read_recipe(path)))
    keys = [{entry.shard: entry.key for entry in item.manifest.entries} for item in (first, second)]
    changed = {shard for shard in keys[0] if keys[0][shard] != keys[1][shard]}
    assert changed == {"layers.3"}


def test_a_derived_checkpoint_is_read_as_any_other(models: Path) -> None:
    plan = make_plan(read_recipe(write(models, "derived", **STACK)))
    derived = plan.checkpoints[1]
    uris = {Path(part.uri).name for part in derived.parts}
    assert uris == {"m1", "m2"}
    stored = Checkpoint(str(models / "m1"), owner="expert 'stack'")
    assert derived.read_small_files().keys() == stored.read_small_files().keys()
    assert json.loads(derived.read_small_file("config.json") or b"") == derived.config


def test_modules_merge_the_language_model_and_keep_the_encoders(lab: Any) -> None:
    lab.make_all(2)
    sources = [
        [
            {"model": "image", "layer_range": [layer, layer + 1]},
            {
                "model": "audio",
                "layer_range": [1 - layer, 2 - layer],
                "parameters": {"weight": 0.5},
            },
        ]
        for layer in (0, 1, 0)
    ]
    decoder = {"slices": [{"sources": pair} for pair in sources]}
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": "image",
        "dtype": "float32",
        "modules": {"text_decoder": decoder, "vision_tower": {"models": [{"model": "image"}]}},
    }
    path = lab.write_recipe(raw, "config.yml")
    run(make_plan(read_recipe(path)))
    export(str(lab.folder / "config-composite"), lab.folder / "export")
    merged = load_file(lab.folder / "export" / "model.safetensors")
    image, audio = (tensors(lab.folder, name) for name in ("image", "audio"))
    for name, value in merged.items():
        if not name.startswith("language_model."):
            assert value.equal(image[name])
            continue
        ours = theirs = name
        if ".layers.2." in name:
            ours = name.replace("layers.2", "layers.0")
        if ".layers." in name:
            theirs = name.replace("layers.1", "layers.x").replace("layers.0", "layers.1")
            theirs = theirs.replace("layers.x", "layers.0").replace("layers.2", "layers.1")
        expected = image[ours].float() + 0.5 * (audio[theirs].float() - image[ours].float())
        torch.testing.assert_close(value, expected)
    config = json.loads((lab.folder / "export" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3
    assert "num_hidden_layers" not in config
    raw["modules"]["vision_tower"] = {"models": [{"model": "audio"}]}
    path = lab.write_recipe(raw, "config.yml")
    with pytest.raises(RecipeError, match=r"modules\.vision_tower: is that of 'image' here"):
        read_recipe(path)
