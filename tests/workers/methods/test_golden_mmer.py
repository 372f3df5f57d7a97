"""MMER against numbers from an independent float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from golden_cases import (
    Case,
    base_of,
    build,
    cases,
    check_close,
    check_masks,
    delta_of,
    expected,
    masks_of,
)

from mmerge.workers.composite.routed_linear import RoutedLinear, RoutedWeights
from mmerge.workers.composite.routing import Routing
from mmerge.workers.reconstruction.bitmask import pack_rows
from mmerge.workers.reconstruction.build_reader import BuildReader

SCOPES = {"global": "model", "per_tensor": "tensor"}


def build_mmer(case: Case, mask_scale: float) -> BuildReader:
    numbers = case["params"]
    keys = {
        "density": numbers["K_keep"],
        "scope": SCOPES[numbers["scope"]],
        "reduction": numbers["aggregate"],
    }
    return build(case, "mmer", mask_scale=mask_scale, **keys)[0]


@cases("mmer")
def test_a_build_has_the_merged_task_vector_masks_and_experts_of_the_golden_case(
    case: dict[str, Any],
) -> None:
    tau_star = expected(case, "tau_star")
    assert tau_star is not None
    for mask_scale in case["params"]["lambdas"]:
        reader = build_mmer(case, mask_scale)
        merged, masks = delta_of(reader), masks_of(reader)
        check_close(case, merged, tau_star)
        check_masks(case, masks, f"mask.lambda{mask_scale}")
        for index, mask in enumerate(masks):
            rebuilt = expected(case, f"rebuilt_expert{index}.lambda{mask_scale}")
            if rebuilt is not None:
                check_close(
                    case,
                    base_of(case) + torch.from_numpy(mask.astype(np.float32)) * merged,
                    rebuilt,
                )


@cases("mmer_expansion")
def test_a_routed_linear_gives_each_token_the_golden_result_of_its_modality(
    case: dict[str, Any],
) -> None:
    reader = build_mmer(case, case["params"]["lam"])
    kinds = expected(case, "token_kind")
    assert kinds is not None
    layers = [name.removeprefix("x.") for name in case["tensors"] if name.startswith("x.")]
    assert layers
    for layer in layers:
        name = f"{layer}.weight"
        routing = Routing()
        base, delta = reader.read(name, "base").float(), reader.read(name, "delta")
        masks = torch.stack(
            [
                pack_rows(reader.read_packed_mask(name, expert), base.shape)
                for expert in reader.expert_names
            ]
        )
        linear = RoutedLinear(
            routing, RoutedWeights.from_masks(base, delta, masks, dtype=torch.float32)
        )
        inputs, outputs = expected(case, f"x.{layer}"), expected(case, f"y.{layer}")
        assert inputs is not None
        assert outputs is not None
        with routing.prefill(kinds.reshape(1, -1).long()):
            actual = linear(inputs.reshape(1, -1, inputs.shape[-1]))
        check_close(case, actual, outputs)
