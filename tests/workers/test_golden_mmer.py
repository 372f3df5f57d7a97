"""MMER against numbers from an independent float64 reference; the folder can be changed by MMERGE_GOLDEN=DIR."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mmerge.manifests.store import open_store
from mmerge.pipeline import make_plan, parse_recipe, run
from mmerge.workers.masks import unpack_mask
from mmerge.workers.routing import RoutedLinear, Routing

GOLDEN = Path(os.environ.get("MMERGE_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
MANIFEST: dict[str, Any] = json.loads((GOLDEN / "cases.json").read_text()) if (GOLDEN / "cases.json").is_file() else {"cases": []}
CASES = [case for case in MANIFEST["cases"] if case["method"] == "mmer"]
EXPANSION_CASES = [case for case in MANIFEST["cases"] if case["method"] == "mmer_expansion"]
pytestmark = pytest.mark.skipif(not CASES, reason=f"no golden data at {GOLDEN} (set MMERGE_GOLDEN)")
SCOPES = {"global": "model", "per_tensor": "tensor"}


@cache
def read_expected(output: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / output)


def expected(case: dict[str, Any], name: str) -> torch.Tensor | None:
    return read_expected(case["output"]).get(f"{case['id'].split('/', 1)[1]}/{name}")


def bits(packed: torch.Tensor | None) -> np.ndarray | None:
    return None if packed is None else np.unpackbits(packed.numpy(), axis=-1)[..., : MANIFEST["n_parameters"]].astype(bool)


def to_flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([named[item["name"]].reshape(-1) for item in MANIFEST["flat_order"]])


def build(case: dict[str, Any], mask_scale: float, folder: Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Run the whole pipeline on a case; return τ⋆ and the masks in the golden flat order, and the raw tensors."""
    inputs = [str(GOLDEN / Path(name).parent) for name in case["inputs"]]
    experts = {f"expert{i}": {"path": path, "modality": f"m{i}"} for i, path in enumerate(inputs[1:])}
    raw = {
        "method": "mmer", "base": inputs[0], "experts": experts, "output": str(folder), "density": case["params"]["K_keep"],
        "scope": SCOPES[case["params"]["scope"]], "reduction": case["params"]["aggregate"], "mask_scale": mask_scale, "dtype": "float32",
    }  # fmt: skip
    report = run(make_plan(parse_recipe(raw, folder=folder)))
    assert report.manifest is not None
    found: dict[str, Any] = {}
    store = open_store(str(folder))
    for entry in report.manifest.entries:
        with safe_open(Path(store.uri) / entry.key, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names = [(item["name"], item["shape"]) for item in MANIFEST["flat_order"]]
    merged = to_flat({name: found[f"{name}.delta"] for name, _ in names})
    masks = torch.stack(
        [to_flat({name: unpack_mask(found[f"{name}.mask.{expert}"], shape) for name, shape in names}) for expert in experts]
    )
    return merged, masks, found


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_a_build_has_the_merged_task_vector_masks_and_experts_of_the_golden_case(case: dict[str, Any], tmp_path: Path) -> None:
    tolerance = case["tolerance"]
    tau_star = expected(case, "tau_star")
    assert tau_star is not None
    for mask_scale in case["params"]["lambdas"]:
        merged, masks, found = build(case, mask_scale, tmp_path)
        torch.testing.assert_close(merged, tau_star.reshape(-1), rtol=tolerance["rtol"], atol=tolerance["atol"])
        wanted = bits(expected(case, f"mask.lambda{mask_scale}"))
        fragile = bits(expected(case, f"fragile.lambda{mask_scale}"))
        assert wanted is not None
        differing = (masks.numpy() != wanted) & ~(fragile if fragile is not None else np.zeros_like(wanted))
        assert not differing.any(), f"{differing.sum()} mask bits differ at mask scale {mask_scale}"
        base = to_flat({item["name"]: found[item["name"]] for item in MANIFEST["flat_order"]}).float()
        for index in range(len(masks)):
            rebuilt = expected(case, f"rebuilt_expert{index}.lambda{mask_scale}")
            if rebuilt is not None:
                torch.testing.assert_close(
                    base + masks[index] * merged, rebuilt.reshape(-1), rtol=tolerance["rtol"], atol=tolerance["atol"]
                )


@pytest.mark.parametrize("case", EXPANSION_CASES, ids=[case["id"] for case in EXPANSION_CASES])
def test_a_routed_linear_gives_each_token_the_golden_result_of_its_modality(case: dict[str, Any], tmp_path: Path) -> None:
    _, _, found = build(case, case["params"]["lam"], tmp_path)
    kinds = expected(case, "token_kind")
    assert kinds is not None
    layers = [name.removeprefix("x.") for name in case["tensors"] if name.startswith("x.")]
    assert layers
    for layer in layers:
        name = f"{layer}.weight"
        base = found[name].float()
        routing = Routing()
        masks = [found[f"{name}.mask.expert{index}"] for index in range(len(case["inputs"]) - 1)]
        linear = RoutedLinear(routing, base=base, delta=found[f"{name}.delta"], masks=masks, dtype=torch.float32)
        inputs, outputs = expected(case, f"x.{layer}"), expected(case, f"y.{layer}")
        assert inputs is not None
        assert outputs is not None
        with routing.prefill(kinds.reshape(1, -1).long()):
            actual = linear(inputs.reshape(1, -1, inputs.shape[-1]))
        torch.testing.assert_close(actual.reshape(outputs.shape), outputs, rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"])
