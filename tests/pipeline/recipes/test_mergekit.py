from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_cases import Case, cases, check_close, expected, input_folders, merged_of

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline import load_composite, make_plan, parse_recipe, read_recipe, run
from mmerge.pipeline.recipes.mergekit import from_mergekit, is_mergekit
from mmerge.workers.reconstruction.build_reader import BuildReader


def make_yaml(**changes: Any) -> dict[str, Any]:
    models = [
        {"model": "base"},
        {"model": "org/one", "parameters": {"weight": 1, "density": 0.5}},
        {"model": "org/two", "parameters": {"weight": 0.5}},
    ]
    return {
        "merge_method": "ties",
        "base_model": "base",
        "models": models,
        "dtype": "bfloat16",
    } | changes


def translate(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    assert is_mergekit(raw)
    return from_mergekit(raw, folder=folder, default_name="config")


def test_a_ties_yaml_becomes_a_recipe_with_mergekits_defaults(tmp_path: Path) -> None:
    found = translate(
        make_yaml(parameters={"int8_mask": True, "lambda": 0.7, "normalize": False}), tmp_path
    )
    assert found == {
        "method": "ties",
        "scope": "tensor",
        "count": "exact",
        "zero_sign": "positive",
        "base": "base",
        "dtype": "bfloat16",
        "output": "config-composite",
        "scale": 0.7,
        "reduction": "sum",
        "experts": {
            "one": {"path": "hf://org/one", "modality": "text", "weight": 1, "density": 0.5},
            "two": {"path": "hf://org/two", "modality": "text", "weight": 0.5, "density": 1.0},
        },
    }
    recipe = parse_recipe(found, folder=tmp_path)
    assert recipe.parameters.model_dump()["reduction"] == "sum"
    assert translate(make_yaml(), tmp_path)["reduction"] == "mean"


def test_filters_and_gradients_of_every_level_become_rules_from_the_inside_out(lab: Any) -> None:
    lab.make_base()
    models = [
        {"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}]}},
        {"model": "b"},
    ]
    shared = {"weight": [{"filter": "q_proj", "value": 2}, {"value": [3, 5]}]}
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": models,
        "parameters": shared,
    }
    experts = translate(raw, lab.folder)["experts"]
    inner = [
        {"value": 0, "layers": [2, 2], "pattern": "*mlp*"},
        {"value": [0, 1], "pattern": "*mlp*"},
    ]
    outer = [{"value": 2, "pattern": "*q_proj*"}, {"value": 3, "layers": [2, 2]}, {"value": [3, 5]}]
    assert experts["a"]["weight"] == inner + outer
    assert experts["b"]["weight"] == outer


def test_embeddings_last_norm_and_head_have_the_beginning_of_a_gradient_as_in_mergekit(
    lab: Any,
) -> None:
    # Seen in what mergekit 0.1.5 writes: the weight of each tensor of a model with one task vector.
    shutil.copytree(lab.make_base(), lab.folder / "a")
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]

    def weights(**config: Any) -> list[float]:
        raw = {"merge_method": "task_arithmetic", "base_model": "base", **config}
        numbers = parse_recipe(translate(raw, lab.folder), folder=lab.folder).parameters_by_tensor(
            names
        )
        return [numbers[name].experts[0]["weight"] for name in names]

    assert weights(models=[{"model": "a", "parameters": {"weight": [0.6, 0.9]}}]) == [
        0.6,
        0.6,
        0.9,
        0.6,
    ]
    sources = [
        [{"model": "base", "layer_range": [i, i + 1]}, {"model": "a", "layer_range": [i, i + 1]}]
        for i in (0, 1)
    ]
    parts = [{"sources": sources[i], "parameters": {"weight": [0.1 + i, 0.2 + i]}} for i in (0, 1)]
    assert weights(slices=parts) == [0.1, 0.2, 1.2, 1.1]


def test_two_models_of_one_name_get_two(tmp_path: Path) -> None:
    models = [
        {"model": "x/model", "parameters": {"weight": 1}},
        {"model": "y/model", "parameters": {"weight": 1}},
    ]
    assert list(translate({"merge_method": "linear", "models": models}, tmp_path)["experts"]) == [
        "model",
        "model-1",
    ]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"merge_method": "core_space"},
            r"merge_method: 'core_space' has no counterpart here; nearest to it is tsv",
        ),
        ({"merge_method": "dare_tie"}, r"nearest to it is dare_ties. Supported are linear"),
        (
            {
                "merge_method": "linear",
                "models": [{"model": "a", "parameters": {"weight": 1}}],
            },
            r"base.parameters.weight: is missing.* base_model is one of the models of linear",
        ),
        ({"merge_method": "passthrough"}, "passthrough takes one model in every slice, got 3"),
        ({"modules": {}}, "is given beside 'modules'"),
        ({"gate_mode": "random"}, "a file of mergekit-moe.* Run it with mergekit-moe"),
        (
            {"tokenizer_source": "base", "tokenizer": "base"},
            "tokenizer_source: is given beside 'tokenizer'",
        ),
        ({"tokenizer": {"sauce": "union"}}, r"tokenizer\.sauce: is unknown. Known are source"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "mean"}}}}},
            r"tokenizer\.tokens\.x\.source\.kind: 'mean' is unknown. Known are model_token, zero",
        ),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "give either 'token' or 'token_id'",
        ),
        ({"chat_template": 3}, "chat_template: expected text"),
        ({"slices": []}, "either 'models' or 'slices'"),
        ({"parameters": {"rescale": True}}, r"parameters\.rescale: .*TIES here does not rescale"),
        ({"parameters": {"densty": 0.5}}, r"parameters\.densty"),
        ({"models": [{"model": "a"}, {"model": "b"}]}, r"a\.parameters\.weight: is missing"),
        ({"models": [{"model": "base"}]}, "none is left beside base_model"),
        ({"base_model": "base+lora+more"}, r"give one adapter, as MODEL\+ADAPTER"),
        (
            {"models": [{"model": "a", "parameters": {"weight": weight}} for weight in (1, 2)]},
            "'a' is given twice",
        ),
        (
            {"models": [{"model": "a", "weight": 1}]},
            r"models\.0\.weight: mergekit does not read it here. Write it under 'parameters'",
        ),
        ({"models": "a"}, "models: expected a list"),
        (
            {"parameters": {"normalize": [{"filter": "mlp", "value": True}, {"value": False}]}},
            "must be true or false for all tensors",
        ),
        ({"parameters": {"lambda": [{"filter": "mlp"}]}}, r"expected \{filter, value\}"),
    ],
)
def test_what_is_not_supported_is_said_with_its_key(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=match):
        translate(make_yaml(**changes), tmp_path)


def test_a_file_of_mergekit_moe_is_refused_by_name(tmp_path: Path) -> None:
    raw = {"base_model": "base", "gate_mode": "random", "experts": [{"source_model": "one"}]}
    with pytest.raises(RecipeError, match="mergekit-moe"):
        translate(raw, tmp_path)


def test_the_tokenizer_of_the_base_may_be_given_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    recipe = translate(make_yaml(tokenizer_source=str(tmp_path / "base")), tmp_path)
    assert recipe["tokenizer"] == {"source": "base"}


def test_an_adapter_of_the_base_is_an_expert(tmp_path: Path) -> None:
    reference = {"model": {"path": "base", "lora": {"path": "lora"}}}
    for value in ("base+lora", reference):
        model = {"model": value, "parameters": {"weight": 1}}
        experts = translate(make_yaml(models=[model]), tmp_path)["experts"]
        assert experts["lora"]["path"] == "lora"


def test_a_revision_is_a_part_of_the_name_on_the_hub(tmp_path: Path) -> None:
    reference = {"model": {"path": "org/one", "revision": "v2"}}
    model = {"model": reference, "parameters": {"weight": 1}}
    (expert,) = translate(make_yaml(models=[model]), tmp_path)["experts"].values()
    assert expert["path"] == "hf://org/one@v2"


def test_keys_that_mergekit_ignores_are_ignored_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = translate(make_yaml(), tmp_path)
    raw = make_yaml(notes="x", parameters={"dtype": "float32", "gamma": 0.1})
    assert translate(raw, tmp_path) == expected
    words = " ".join(record.getMessage() for record in caplog.records)
    assert all(key in words for key in ("notes", "parameters.dtype", "parameters.gamma"))


def test_a_missing_base_is_refused_where_the_method_needs_one(tmp_path: Path) -> None:
    raw = make_yaml(models=[{"model": "a", "parameters": {"weight": 1}}])
    del raw["base_model"]
    with pytest.raises(RecipeError, match="base: is missing; 'ties' works on task vectors"):
        parse_recipe(translate(raw, tmp_path), folder=tmp_path)


def slices(*ranges: tuple[int, int], **parameters: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for first, stop in ranges:
        sources = [{"model": name, "layer_range": [first, stop]} for name in ("image", "audio")]
        found.append({"sources": sources, "parameters": {"weight": float(first + 1)} | parameters})
    return found


def test_slices_of_equal_layer_ranges_keep_their_own_parameters(lab: Any) -> None:
    lab.make_all(2)
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": slices((0, 1), (1, 2)),
        "dtype": "float32",
    }
    run(make_plan(read_recipe(lab.write_recipe(raw, "config.yml"))))
    reader = BuildReader(str(lab.folder / "config-composite"))
    for name, base in lab.base.items():
        weight = 1.0 if "embed" in name or "layers.0" in name else 2.0
        total = sum(
            lab.expert_tensors(seed)["language_model." + name][: base.shape[0]].float()
            - base.float()
            for seed in (0, 1)
        )
        torch.testing.assert_close(reader.read(name, "merged"), base.float() + weight * total)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (slices((1, 1)), r"layer_range: expected \[first, last \+ 1\], got \[1, 1\]"),
        (
            [
                {
                    "sources": [
                        {"model": "image", "layer_range": [0, 2]},
                        {"model": "audio", "layer_range": [0, 1]},
                    ]
                }
            ],
            "different numbers of layers",
        ),
        ([{"sources": [{"model": "image"}]}], r"layer_range: expected \[first, last \+ 1\]"),
    ],
)
def test_malformed_slices_are_refused(found: list[dict[str, Any]], match: str, lab: Any) -> None:
    lab.make_all(2)
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "slices": found,
        "parameters": {"weight": 1},
    }
    with pytest.raises(RecipeError, match=match):
        read_recipe(lab.write_recipe(raw, "config.yml"))


MERGEKIT_CASES = ("ties_per_tensor", "breadcrumbs", "breadcrumbs_ties", "sce", "ram", "ramplus")


@cases(*MERGEKIT_CASES)
def test_a_yaml_gives_the_numbers_that_mergekit_gave(case: Case, tmp_path: Path) -> None:
    base, *folders = input_folders(case)
    numbers = case["params"]
    per_model = [
        {"weight": weight} | {key: numbers[key] for key in ("density", "gamma") if key in numbers}
        for weight in numbers.get("weights", [])
    ]
    models = [
        {"model": str(path)} | ({"parameters": per_model[index]} if per_model else {})
        for index, path in enumerate(folders)
    ]
    shared = {
        key: numbers[key]
        for key in ("normalize", "select_topk", "epsilon", "r", "alpha")
        if key in numbers
    }
    method = {"ties_per_tensor": "ties", "ramplus": "ramplus_tl"}.get(
        case["method"], case["method"]
    )
    raw = {
        "merge_method": method,
        "base_model": str(base),
        "models": models,
        "parameters": shared,
        "dtype": "float32",
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(raw))
    run(make_plan(read_recipe(tmp_path / "config.yml")))
    wanted = expected(case, "merged")
    assert wanted is not None
    check_close(case, merged_of(BuildReader(str(tmp_path / "config-composite"))), wanted)


def test_text_models_merged_by_a_yaml_answer_as_a_composite(
    repository: Path, tmp_path: Path
) -> None:
    lab = repository / "examples" / "lab" / "checkpoints"
    shutil.copytree(lab / "base", tmp_path / "twin")
    models = [
        {"model": str(lab / "base"), "parameters": {"weight": 1}},
        {"model": str(tmp_path / "twin"), "parameters": {"weight": [0.5, 1]}},
    ]
    (tmp_path / "config.yml").write_text(
        yaml.safe_dump({"merge_method": "linear", "models": models})
    )
    run(make_plan(read_recipe(tmp_path / "config.yml")))
    composite = load_composite(str(tmp_path / "config-composite"))
    retained = load_composite(str(tmp_path / "config-composite"), mode="retention", expert="twin")
    question = composite.prompt("which digit is in the image ?")
    assert composite.logits(question).equal(retained.logits(question))


@pytest.mark.parametrize("value", ["false", 0, [True, False], [{"filter": "mlp", "value": False}]])
def test_a_switch_that_is_not_true_or_false_is_refused(tmp_path: Path, value: Any) -> None:
    raw = make_yaml(merge_method="nuslerp", parameters={"nuslerp_flatten": value, "weight": 1})
    with pytest.raises(RecipeError, match=r"parameters\.nuslerp_flatten: expected true or false"):
        translate(raw, tmp_path)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("nuslerp", {"nuslerp_flatten": False}), ("multislerp", {"eps": 1e-3})],
)
def test_a_setting_of_the_whole_merge_is_refused_at_a_model(
    tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    models = [{"model": "a", "parameters": parameters | {"weight": 1}}, {"model": "b"}]
    raw = {"merge_method": method, "models": models, "parameters": {"weight": 1}}
    with pytest.raises(RecipeError, match="is one setting for the whole merge"):
        translate(raw, tmp_path)


def test_an_eps_that_is_no_number_is_refused(tmp_path: Path) -> None:
    raw = make_yaml(merge_method="multislerp", parameters={"eps": "abc", "weight": 1})
    with pytest.raises(RecipeError, match=r"parameters\.eps: is not supported"):
        translate(raw, tmp_path)
