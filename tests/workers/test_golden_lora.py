"""Merges of LoRA adapters against golden data: the products through the whole pipeline, the factors as the official code does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.workers.methods.lora_factors import average_lora
from mmerge.workers.reader import BuildReader

GOLDEN = Path(os.environ.get("MMERGE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text()) if (GOLDEN / "cases.json").is_file() else {"cases": []}
PRODUCTS = [case for case in MANIFEST["cases"] if case["method"] == "naivemc_weight_space"]
FACTORS = [case for case in MANIFEST["cases"] if case["method"] == "naivemc" or case["method"].startswith("lora_factor_")]
pytestmark = pytest.mark.skipif(not PRODUCTS, reason=f"no golden data of adapters at {GOLDEN} (set MMERGE_GOLDEN)")
NAMES = {"ta": "sum"}


@pytest.mark.parametrize("case", PRODUCTS, ids=[case["id"] for case in PRODUCTS])
def test_adapters_as_experts_are_merged_by_their_products(case: dict[str, Any], tmp_path: Path) -> None:
    base, *adapters = [Path(name).parent for name in case["inputs"]]
    experts = {path.name: {"path": str(GOLDEN / path), "modality": path.name.removeprefix("lora_")} for path in adapters}
    method = {"sum": "task_arithmetic", "mean": "naive_mc"}[case["params"]["strategy"]]
    raw = {"method": method, "base": str(GOLDEN / base), "experts": experts, "output": str(tmp_path), "dtype": "float32"}
    run(make_plan(parse_recipe(raw, folder=tmp_path)))
    reader = BuildReader(str(tmp_path))
    merged = torch.cat([reader.text_weight(item["name"]).reshape(-1) for item in MANIFEST["flat_order"]])
    expected = load_file(GOLDEN / case["output"])[f"{case['id'].split('/', 1)[1]}/merged"]
    torch.testing.assert_close(merged, expected, rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"])


@pytest.mark.parametrize("case", FACTORS, ids=[case["id"] for case in FACTORS])
def test_factors_averaged_one_by_one_are_those_of_the_official_code(case: dict[str, Any]) -> None:
    params = case["params"]
    strategy = params.get("strategy") or NAMES.get(params["method"], params["method"])
    adapters = [
        {name: value for name, value in load_file(GOLDEN / path).items() if ".default." in name}
        for path in case["inputs"]
        if path.endswith("adapter_model.safetensors")
    ]
    density = (params.get("K") or 20) / 100
    merged = average_lora(adapters, strategy=strategy, density=density, iterations=params.get("iterations") or 300)
    prefix = case["id"].split("/", 1)[1] + "/"
    expected = {name.removeprefix(prefix): value for name, value in load_file(GOLDEN / case["output"]).items() if name.startswith(prefix)}
    assert len(expected) == case["n_tensors"]
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"], msg=name)
