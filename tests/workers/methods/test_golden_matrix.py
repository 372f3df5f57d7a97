"""The slerp family, whole-matrix methods, AdaMMS and Neuron-Fusion against golden data, through the
whole pipeline.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from golden_cases import GOLDEN, Case, cases, expected, to_flat

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.workers.methods.adamms import choose_alpha
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import text_weight


def _slerp(params: dict[str, Any]) -> dict[str, Any]:
    return {"method": "slerp", "t": params["t"], "experts": [params["first"], params["second"]]}


def _nuslerp(params: dict[str, Any]) -> dict[str, Any]:
    along = "tensor" if params["flatten"] else "columns" if params["row_wise"] else "rows"
    return {
        "method": "nuslerp",
        "along": along,
        "origin": "base" if params["base"] else "zero",
        "experts": [params["first"], params["second"]],
        "each": [{"weight": weight} for weight in params["weights"]],
    }


def _multislerp(params: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": "multislerp",
        "origin": "base" if params["base"] else "zero",
        "normalize": params["normalize_weights"],
        "each": [{"weight": weight} for weight in params["weights"]],
    }


def _optmerge(params: dict[str, Any]) -> dict[str, Any]:
    form = "full" if "centred" in params["form"] else "lora"
    return {
        "method": "optmerge",
        "form": form,
        "iterations": params["iterations"],
        "scale": params["scaling"],
    }


def _swudi(params: dict[str, Any]) -> dict[str, Any]:
    time = params["exp_time"] if params["filter_type"] == "exponential" else None
    return {
        "method": "swudi",
        "time": time,
        "rank_ratio": params["truncate_rank_ratio"],
        "start": params["init_mode"],
        "min_eigenvalue": params["min_eigenvalue"],
        "scale": params["scaling_coefficient"],
    }


def _aswudi(params: dict[str, Any]) -> dict[str, Any]:
    time = params["exp_time"] if params["filter_type"] == "exponential" else None
    return {
        "method": "aswudi",
        "time": time,
        "rank_rule": params["auto_rank_method"],
        "start": params["init_mode"],
        "min_eigenvalue": params["min_eigenvalue"],
        "scale": params["scaling_coefficient"],
    }


def _adamms(params: dict[str, Any]) -> dict[str, Any]:
    norms = "interpolate" if params["norms"] == "interpolated" else "target"
    return {
        "method": "adamms",
        "alpha": params["alpha"],
        "norms": norms,
        "experts": [params["target"], params["source"]],
    }


def _neuron_fusion(params: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": "neuron_fusion",
        "keep_ratio": params["keep_ratio"],
        "suppress": params["suppress"],
        "restore": params["restore_norm"],
        "query_key": "neuron" if params["qk"] == "unit" else "expert",
        "experts": [params["tuned"]],
    }


RECIPES = {
    "slerp": _slerp,
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": lambda params: {
        "method": "karcher",
        "max_iter": params["max_iter"],
        "tol": params["tol"],
    },
    "model_stock": lambda params: {"method": "model_stock", "filter_wise": params["filter_wise"]},
    "arcee_fusion": lambda params: {"method": "arcee_fusion", "experts": [params["expert"]]},
    "nearswap": lambda params: {
        "method": "nearswap",
        "t": params["t"],
        "experts": [params["expert"]],
    },
    "tsv": lambda params: {"method": "tsv", "scale": params["scaling"]},
    "iso_c": lambda params: {"method": "iso_c", "scale": params["scaling"]},
    "wudi": lambda params: {
        "method": "wudi",
        "scale": params["scaling"],
        "iterations": params["iterations"],
    },
    "optmerge": _optmerge,
    "swudi": _swudi,
    "aswudi": _aswudi,
    "adamms_interpolation": _adamms,
    "neuron_fusion_reconstruction": _neuron_fusion,
}


def build(case: Case, folder: Path) -> torch.Tensor:
    """Run the recipe of a case; return the merged model in the golden flat order."""
    recipe = RECIPES[case["method"]](case["params"])
    folders = {Path(name).parent.name: str(GOLDEN / Path(name).parent) for name in case["inputs"]}
    names = recipe.pop("experts", [name for name in folders if name != "base"])
    each = recipe.pop("each", [{}] * len(names))
    experts = {
        name: {"path": folders[name], "modality": "text", **numbers}
        for name, numbers in zip(names, each, strict=True)
    }
    raw = recipe | {
        "base": folders["base"],
        "experts": experts,
        "output": str(folder),
        "dtype": "float32",
    }
    run(make_plan(parse_recipe(raw, folder=folder)))
    reader = BuildReader(str(folder))
    return to_flat({name: text_weight(reader, name) for name in reader.llm_names()})


@cases(*RECIPES)
def test_a_build_has_the_weights_of_the_golden_case(case: Case, tmp_path: Path) -> None:
    merged = expected(case, "merged")
    assert merged is not None
    tolerance = case["tolerance"]
    torch.testing.assert_close(
        build(case, tmp_path), merged.reshape(-1), rtol=tolerance["rtol"], atol=tolerance["atol"]
    )


@cases("adamms_search")
def test_the_alpha_chosen_from_answers_is_that_of_the_golden_case(case: Case) -> None:
    searches = json.loads((GOLDEN / case["output"]).read_text())["cases"]
    assert searches
    for search in searches:
        choice = choose_alpha(
            {float(alpha): answers for alpha, answers in search["responses"].items()}
        )
        assert list(choice.differences) == search["differences"], search["name"]
        assert list(choice.best) == search["chosen_alphas"], search["name"]
