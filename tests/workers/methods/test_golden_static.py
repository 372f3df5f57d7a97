"""Static merges and masks of the whole pipeline against the numbers of the official
implementations.
"""

from __future__ import annotations

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
    expected_bits,
    masks_of,
    merged_of,
)

from mmerge.workers.reconstruction.weights import rebuild_weight


def weights(case: Case) -> list[dict[str, float]]:
    return [
        {"weight": weight}
        for weight in case["params"].get("weights", [1.0] * (len(case["inputs"]) - 1))
    ]


def check_merged(case: Case, actual: torch.Tensor) -> None:
    wanted = expected(case, "merged")
    assert wanted is not None
    check_close(case, actual, wanted)


@cases("weight_average")
def test_linear_is_the_average(case: Case) -> None:
    check_merged(case, merged_of(build(case, "linear")[0]))


@cases("task_arithmetic")
def test_task_arithmetic_adds_scaled_task_vectors(case: Case) -> None:
    check_merged(
        case, merged_of(build(case, "task_arithmetic", scale=case["params"]["scaling"])[0])
    )


@cases("ties_global")
def test_ties_over_the_whole_model(case: Case) -> None:
    numbers = case["params"]
    keys = {
        "density": numbers["K_percent"] / 100,
        "reduction": numbers["aggregate"],
        "scale": numbers["scaling"],
    }
    merged = merged_of(build(case, "ties", zero_sign="majority", **keys)[0])
    tau = expected(case, "tau")
    assert tau is not None
    check_close(case, merged, base_of(case) + numbers["scaling"] * tau)
    if expected(case, "merged") is not None:
        check_merged(case, merged)


@cases("ties_global")
def test_a_zero_sum_that_elects_nothing_differs_from_the_official_rule_at_zero_sums_alone(
    case: Case,
) -> None:
    numbers = case["params"]
    keys = {"density": numbers["K_percent"] / 100, "reduction": numbers["aggregate"]}
    merged = merged_of(build(case, "ties", **keys)[0])
    tau, zero_sum = expected(case, "tau"), expected_bits(case, "zero_sum")
    assert tau is not None
    zero = (
        torch.zeros(len(tau), dtype=torch.bool) if zero_sum is None else torch.from_numpy(zero_sum)
    )
    base = base_of(case)
    assert merged[zero].equal(base[zero])
    check_close(case, torch.where(zero, base, merged), torch.where(zero, base, base + tau))


@cases("ties_per_tensor")
def test_ties_with_an_exact_count_per_tensor(case: Case) -> None:
    numbers = case["params"]
    reduction = "mean" if numbers["normalize"] else "sum"
    keys = {"density": numbers["density"], "reduction": reduction, "scale": numbers["scaling"]}
    reader, _ = build(
        case,
        "ties",
        experts=weights(case),
        scope="tensor",
        count="exact",
        zero_sign="positive",
        **keys,
    )
    check_merged(case, merged_of(reader))


@cases("ties_per_tensor_kth")
def test_ties_with_a_threshold_per_tensor(case: Case) -> None:
    numbers = case["params"]
    keys = {
        "density": round(1 - numbers["mask_rate"], 12),
        "reduction": numbers["aggregate"],
        "scale": numbers["scaling"],
    }
    check_merged(
        case,
        merged_of(
            build(case, "ties", scope="tensor", rounding="dropped", zero_sign="majority", **keys)[0]
        ),
    )


@cases("breadcrumbs", "breadcrumbs_ties")
def test_breadcrumbs(case: Case) -> None:
    numbers = case["params"]
    keys = {"density": numbers["density"], "gamma": numbers["gamma"]}
    if numbers["consensus"]:
        keys |= {"zero_sign": "positive", "reduction": "mean" if numbers["normalize"] else "sum"}
    else:
        keys |= {"normalize": numbers["normalize"]}
    check_merged(case, merged_of(build(case, case["method"], experts=weights(case), **keys)[0]))


@cases("sce")
def test_sce(case: Case) -> None:
    check_merged(case, merged_of(build(case, "sce", select_topk=case["params"]["select_topk"])[0]))


@cases("ram", "ramplus")
def test_ram(case: Case) -> None:
    keys = {
        name: case["params"][name] for name in ("epsilon", "r", "alpha") if name in case["params"]
    }
    check_merged(
        case, merged_of(build(case, "ram_plus" if case["params"]["plus"] else "ram", **keys)[0])
    )


@cases("pcb_merging")
def test_pcb(case: Case) -> None:
    numbers = case["params"]
    reader, report = build(
        case,
        "pcb",
        ratio=numbers["pcb_ratio"],
        scale=numbers["lambdas"],
        clamp_ratio=numbers["clamp_ratio"],
    )
    tau = expected(case, "tau")
    assert tau is not None
    check_close(case, merged_of(reader), base_of(case) + tau)
    assert report.num_computed["scores"] > 0


def multi_task_keys(case: Case) -> dict[str, object]:
    is_ties = "ties" in case["params"]["multi_task_vector"].lower()
    return (
        {"multi_task": "ties", "density": 0.2, "zero_sign": "majority"}
        if is_ties
        else {"multi_task": "task_arithmetic"}
    )


@cases("tall_masks")
def test_tall_masks(case: Case) -> None:
    tau = expected(case, "tau_mt")
    assert tau is not None
    for mask_scale in case["params"]["lambdas"]:
        reader, _ = build(case, "tall_masks", mask_scale=mask_scale, **multi_task_keys(case))
        check_close(case, delta_of(reader), tau)
        check_masks(case, masks_of(reader), f"mask.lambda{mask_scale}")


@cases("consensus")
def test_consensus(case: Case) -> None:
    numbers = case["params"]
    experts = [{"mask_scale": scale} for scale in numbers["lambdas"]]
    keys = multi_task_keys(case) | {"agreement": numbers["k"], "scale": numbers["scaling"]}
    merged = merged_of(build(case, "consensus", experts=experts, **keys)[0])
    base, mask, tau = base_of(case), expected_bits(case, "consensus_mask"), expected(case, "tau")
    assert mask is not None
    assert merged[torch.from_numpy(~mask)].equal(base[torch.from_numpy(~mask)])
    if tau is None:  # the multi-task vector stands in the case of the task masks
        found = build(case, "tall_masks", **multi_task_keys(case))[0]
        tau = torch.where(torch.from_numpy(mask), delta_of(found), torch.zeros_like(base))
    check_close(case, merged, base + numbers["scaling"] * tau)


@cases("emr_merging")
def test_emr(case: Case) -> None:
    reader, report = build(case, "emr")
    unified, rescalers = expected(case, "tau_unified"), expected(case, "rescalers")
    assert unified is not None
    assert rescalers is not None
    check_close(case, delta_of(reader), unified)
    check_masks(case, masks_of(reader), "masks")
    assert report.manifest is not None
    found = torch.tensor([expert.rescaler for expert in report.manifest.experts])
    torch.testing.assert_close(
        found, rescalers, rtol=case["tolerance"]["rtol"], atol=case["tolerance"]["atol"]
    )
    for index, name in enumerate(reader.expert_names):
        rebuilt = expected(case, f"rebuilt_expert{index}")
        if rebuilt is not None:
            check_close(
                case,
                torch.cat(
                    [
                        rebuild_weight(reader, key, expert=name).reshape(-1)
                        for key in sorted(reader.names("delta"))
                    ]
                ),
                rebuilt,
            )
    assert np.isfinite(found.numpy()).all()
