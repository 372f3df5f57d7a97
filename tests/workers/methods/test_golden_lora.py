"""Merges of LoRA adapters against golden data: the products through the whole pipeline, the factors
as the official code does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from golden_cases import GOLDEN, Case, cases, expected, read_file, to_flat

from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.workers.methods.lora_factors import average_lora
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import text_weight

NAMES = {"ta": "sum"}
"""Names of strategies that differ from ours."""


@cases("naivemc_weight_space")
def test_adapters_as_experts_are_merged_by_their_products(case: Case, tmp_path: Path) -> None:
    base, *adapters = [Path(name).parent for name in case["inputs"]]
    experts = {
        path.name: {"path": str(GOLDEN / path), "modality": path.name.removeprefix("lora_")}
        for path in adapters
    }
    method = {"sum": "task_arithmetic", "mean": "naive_mc"}[case["params"]["strategy"]]
    raw = {
        "method": method,
        "base": str(GOLDEN / base),
        "experts": experts,
        "output": str(tmp_path),
        "dtype": "float32",
    }
    run(make_plan(parse_recipe(raw, folder=tmp_path)))
    reader = BuildReader(str(tmp_path))
    merged = to_flat({name: text_weight(reader, name) for name in reader.llm_names()})
    wanted = expected(case, "merged")
    assert wanted is not None
    torch.testing.assert_close(
        merged, wanted.reshape(-1), rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"]
    )


@cases(
    "naivemc",
    "lora_factor_ta",
    "lora_factor_tsv",
    "lora_factor_iso",
    "lora_factor_wudi",
    "lora_factor_wudi2",
)
def test_factors_averaged_one_by_one_are_those_of_the_official_code(case: Case) -> None:
    params = case["params"]
    strategy = params.get("strategy") or NAMES.get(params["method"], params["method"])
    adapters = [
        {name: value for name, value in read_file(path).items() if ".default." in name}
        for path in case["inputs"]
        if path.endswith("adapter_model.safetensors")
    ]
    density = (params.get("K") or 20) / 100
    merged = average_lora(
        adapters, strategy=strategy, density=density, iterations=params.get("iterations") or 300
    )
    prefix = case["id"].split("/", 1)[1] + "/"
    expected = {
        name.removeprefix(prefix): value
        for name, value in read_file(case["output"]).items()
        if name.startswith(prefix)
    }
    assert len(expected) == case["n_tensors"]
    for name, value in expected.items():
        torch.testing.assert_close(
            merged[name],
            value,
            rtol=case["tolerance"]["rtol"],
            atol=case["tolerance"]["atol"],
            msg=name,
        )
