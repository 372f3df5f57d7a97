from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline import make_recipe_schema, parse_recipe, read_recipe
from mmerge.workers.methods import find_method, method_names


def make_raw(**changes: Any) -> dict[str, Any]:
    experts = {
        "image": {"path": "a", "modality": "image"},
        "audio": {"path": "b", "modality": "audio", "mask_scale": 0.6},
    }
    return {"base": "base", "method": "mmer", "output": "store", "experts": experts} | changes


def refused(raw: object, match: str, folder: Path) -> None:
    with pytest.raises(RecipeError, match=match):
        parse_recipe(raw, folder=folder)


def test_paths_start_at_the_recipes_folder_and_defaults_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "my recipe.yaml"
    path.write_text(yaml.safe_dump(make_raw(output="s3://bucket/prefix"), sort_keys=False))
    recipe = read_recipe(path)
    assert recipe.name == "my-recipe"
    assert recipe.base == str(tmp_path / "base")
    assert recipe.output == "s3://bucket/prefix"
    assert recipe.parameters.model_dump() == {
        "density": 0.8,
        "scope": "model",
        "reduction": "sum",
        "mask_scale": 0.75,
    }
    assert [expert.parameters.model_dump() for expert in recipe.experts] == [
        {"mask_scale": None, "density": None},
        {"mask_scale": 0.6, "density": None},
    ]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"density": 80}, r"^RecipeError: density: expected a number in \(0, 1\], got 80$"),
        ({"density": 0}, r"density: expected a number in \(0, 1\], got 0"),
        ({"density": "much"}, r"density: expected a number in \(0, 1\], got 'much'"),
        (
            {"dens": 0.8},
            r"dens: unknown key for method 'mmer'\. Did you mean 'density'\?"
            r" Known keys: method, experts",
        ),
        ({"scale": 1.0}, "scale: unknown key for method 'mmer'"),
        ({"method": "ties", "mask_scale": 0.5}, "mask_scale: unknown key for method 'ties'"),
        ({"method": "soup"}, "method: there is no 'soup'. Choose one of mmer"),
        ({"experts": {}}, "experts: "),
        ({"experts": {"a": {"path": "a"}}}, "experts.a.modality: is missing"),
        (
            {"experts": {"a": {"path": "a", "modality": "image", "density": 80}}},
            r"experts.a.density: expected a number in \(0, 1\], got 80",
        ),
        (
            {"experts": {"a": {"path": "a", "modality": "image", "weights": 1}}},
            r"experts.a.weights: unknown key for method 'mmer'\. Known keys: path",
        ),
        (
            {
                "experts": {
                    "a": {"path": "x", "modality": "image"},
                    "b": {"path": "./x", "modality": "audio"},
                }
            },
            "experts.b.path: .* is expert 'a' already",
        ),
        (
            {"experts": {"a": {"path": "base", "modality": "image"}}},
            "experts.a.path: .* is the base already",
        ),
        ({"experts": {"a/b": {"path": "x", "modality": "image"}}}, "no valid name"),
        ({"dtype": "int8"}, "dtype: .*got 'int8'"),
        ({"name": "a/b"}, "name: "),
        ({"template": "no place"}, "template: must contain {text} once"),
        ({"base": 7}, "base: .*got 7"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_keys_path(
    changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    refused(make_raw(**changes), match, tmp_path)


def test_a_missing_key_and_what_is_no_mapping_are_refused(tmp_path: Path) -> None:
    raw = make_raw()
    del raw["base"]
    refused(raw, "base: is missing", tmp_path)
    refused([1], "a recipe is a mapping", tmp_path)
    refused({"base": "b"}, "method: is missing", tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("base: a\nbase: b\n", "line 2, column 1: key 'base' is given twice"),
        ("experts:\n  image: {path: a}\n  image: {path: b}\n", "key 'image' is given twice"),
        ("base: [", "line "),
        ("base: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_yaml_is_strict(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=match):
        read_recipe(path)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml: no such recipe file"):
        read_recipe(tmp_path / "nothing.yaml")


def test_the_schema_accepts_what_the_parser_accepts_and_refuses_the_rest() -> None:
    schema = make_recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(make_raw())
    for bad in (make_raw(density=80), make_raw(dens=1), make_raw(method="soup")):
        with pytest.raises(jsonschema.ValidationError):
            validator.validate(bad)


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_source_a_docstring_and_described_parameters(name: str) -> None:
    method = find_method(name)
    assert method.source
    assert type(method).__doc__
    for model in (method.parameters_model, method.expert_parameters_model):
        assert all(field.description for field in model.model_fields.values())
