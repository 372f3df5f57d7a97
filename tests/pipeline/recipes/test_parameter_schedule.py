from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from mmerge.manifests.errors import RecipeError
from mmerge.pipeline import make_plan, make_recipe_schema, parse_recipe, read_recipe, run
from mmerge.pipeline.recipes.parameter_schedule import numeric_fields, parse_schedule
from mmerge.workers.methods import find_method, method_names
from mmerge.workers.methods.locate_then_merge import SumParameters
from mmerge.workers.methods.ties import TiesExpertParameters, TiesParameters
from mmerge.workers.reconstruction.build_reader import BuildReader

NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)),
    "model.norm.weight",
    "lm_head.weight",
]


def scales(value: list[Any]) -> list[float | int | None]:
    schedule = parse_schedule(value, SumParameters, "scale", path="scale")
    return [schedule.at(name, 5) for name in NAMES]


def test_a_gradient_is_interpolated_over_the_layers_and_held_before_and_after_them() -> None:
    assert scales([0, 1]) == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert scales([0, 1, 0]) == [0, 0, 0.5, 1, 0.5, 0, 0, 0]
    assert scales([0.3]) == [0.3] * 8


def test_the_first_rule_that_fits_decides() -> None:
    rules = [{"value": 1, "layers": [0, 1]}, {"value": 2, "pattern": "*self_attn*"}, {"value": 3}]
    assert scales(rules) == [3, 1, 1, 2, 2, 2, 3, 3]


def test_a_gradient_of_a_rule_runs_over_its_layers_and_where_no_rule_fits_the_default_holds() -> (
    None
):
    assert scales([{"value": [0, 1], "layers": [1, 3]}]) == [
        None,
        None,
        0,
        0.5,
        1,
        None,
        None,
        None,
    ]
    assert scales([{"value": 5, "layers": [-1, 0]}]) == [5, 5, None, None, None, None, None, None]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([], "density: is an empty list"),
        ([0.2, 3], r"density\.0: expected a number in \(0, 1\], got 3"),
        ([{"value": 0.5, "layer": 3}], r"density\.0: .*a rule has a 'value'"),
        ([{"value": 0.5, "layers": [3, 1]}], "ends before it begins"),
        ([{"value": 0.5}, {"value": 0.6, "pattern": "*"}], "the rules after it have no effect"),
        ([{"value": "many"}], r"density\.0:"),
    ],
)
def test_a_schedule_that_is_not_valid_is_refused_with_its_place(
    value: list[Any], match: str
) -> None:
    with pytest.raises(RecipeError, match=match):
        parse_schedule(value, TiesParameters, "density", path="density")


def test_choices_and_switches_take_no_schedule() -> None:
    assert numeric_fields(TiesParameters) == ["density", "scale"]
    assert numeric_fields(TiesExpertParameters) == ["weight", "density"]
    assert "normalize" not in numeric_fields(SumParameters)


def test_numbers_of_recipe_and_experts_hold_tensor_by_tensor(lab: Any) -> None:
    raw = lab.make_all() | {"method": "task_arithmetic", "dtype": "float32", "scale": [0.0, 1.0]}
    raw["experts"]["audio"]["weight"] = [{"value": 0.5, "pattern": "*mlp*"}, {"value": 0}]
    report = run(make_plan(read_recipe(lab.write_recipe(raw))))
    assert report.manifest is not None
    assert report.manifest.parameters["scale"] == [{"value": [0.0, 1.0]}]
    reader = BuildReader(str(lab.folder / "store"))
    for name, base in lab.base.items():
        scale = 0.0 if "embed" in name or "layers.0" in name else 1.0
        weights = (1.0, 0.5 if "mlp" in name else 0.0, 1.0)
        total = torch.zeros(base.shape)
        for seed, weight in enumerate(weights):
            total += weight * (
                lab.expert_tensors(seed)["language_model." + name][: base.shape[0]].float()
                - base.float()
            )
        torch.testing.assert_close(reader.read(name, "merged"), base.float() + scale * total)


def test_a_density_that_differs_between_tensors_needs_scope_tensor(lab: Any) -> None:
    raw = lab.make_all() | {"method": "ties", "density": [0.2, 0.8]}
    with pytest.raises(RecipeError, match="Add 'scope: tensor'"):
        run(make_plan(read_recipe(lab.write_recipe(raw))))
    run(make_plan(read_recipe(lab.write_recipe(raw | {"scope": "tensor"}))))
    raw = lab.make_all() | {"method": "pcb", "ratio": [0.1, 0.5]}
    with pytest.raises(RecipeError, match="Add 'scope: tensor'"):
        run(make_plan(read_recipe(lab.write_recipe(raw))))
    run(make_plan(read_recipe(lab.write_recipe(raw | {"scope": "tensor"}))))


def test_numbers_that_do_not_fit_together_on_one_tensor_are_refused(lab: Any) -> None:
    raw = lab.make_all() | {"method": "della", "density": [0.5, 0.9]}
    with pytest.raises(RecipeError, match=r"epsilon: with density 0\.9"):
        make_plan(read_recipe(lab.write_recipe(raw)))


def test_another_number_for_one_layer_merges_that_layer_alone(lab: Any) -> None:
    raw = lab.make_all() | {"method": "task_arithmetic"}
    run(make_plan(read_recipe(lab.write_recipe(raw))))
    again = run(
        make_plan(
            read_recipe(lab.write_recipe(raw | {"scale": [{"value": 0.5, "layers": [1, 1]}]}))
        )
    )
    assert again.num_computed["merge"] == 1


def test_the_schema_takes_a_schedule_wherever_the_parser_does(tmp_path: Path) -> None:
    schema = make_recipe_schema()
    for name in method_names():
        method = find_method(name)
        definition = "".join(word.title() for word in name.split("_")) + "Recipe"
        validator = jsonschema.Draft202012Validator(
            schema | {"anyOf": [{"$ref": f"#/$defs/{definition}"}]}
        )
        numbers = {
            key: field
            for key, field in method.parameters_model.model_fields.items()
            if key in numeric_fields(method.parameters_model)
        }
        required = {key: 0.5 for key, field in numbers.items() if field.is_required()}
        experts = {
            f"e{index}": {"path": f"{index}", "modality": "image"}
            for index in range(method.max_experts or 2)
        }
        raw = {"base": "base", "method": name, "output": "store", "experts": experts} | required
        for key, field in numbers.items():
            number = 0.5 if field.is_required() else field.get_default()
            if number is None:
                continue
            scheduled = raw | {key: [{"value": number, "layers": [0, 3]}]}
            validator.validate(scheduled)
            validator.validate(raw | {key: [number, number]})
            assert not validator.is_valid(raw | {key: [{"value": number, "layer": 1}]})
            assert (
                parse_recipe(scheduled, folder=tmp_path).schedules[""][key].at(NAMES[1], 5)
                == number
            )
