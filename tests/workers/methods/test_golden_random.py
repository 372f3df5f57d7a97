"""Random methods: keep probabilities, and mean and spread over seeds, against the official
implementations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_cases import (
    Case,
    base_of,
    cases,
    expected,
    expected_bits,
    from_flat,
    input_folders,
    read_inputs,
    to_flat,
)
from one_tensor import merge_tensor

from mmerge.workers.methods.locate_rules import keep_probabilities

NUM_DRAWS = 200


@cases("della_keep_probability")
def test_della_keeps_an_entry_with_the_golden_probability(case: Case) -> None:
    base, *experts = read_inputs(*input_folders(case))
    wanted, tied = expected(case, "probs"), expected_bits(case, "tied")
    assert wanted is not None
    numbers, tolerance = case["params"], case["tolerance"]
    for index, expert in enumerate(
        experts[: len(wanted)]
    ):  # some cases keep the first expert alone
        found = {}
        for name, values in expert.items():
            delta = values - base[name]
            rows = delta if delta.ndim == 2 else delta.reshape(1, -1)
            found[name] = keep_probabilities(
                rows, density=numbers["density"], epsilon=numbers["epsilon"]
            ).reshape(delta.shape)
        free = (
            torch.ones(len(wanted[index]), dtype=torch.bool)
            if tied is None
            else torch.from_numpy(~tied[index])
        )
        actual = to_flat(found)
        torch.testing.assert_close(
            actual[free],
            wanted[index][free].float(),
            rtol=tolerance["rtol"],
            atol=tolerance["atol"],
        )
        for name, probabilities in from_flat(wanted[index].float()).items():
            # Equal magnitudes share ranks in some order: each row has the same probabilities,
            # whatever their order.
            rows = (1, -1) if probabilities.ndim < 2 else probabilities.shape
            torch.testing.assert_close(
                found[name].reshape(rows).sort(dim=1).values,
                probabilities.reshape(rows).sort(dim=1).values,
                rtol=1e-5,
                atol=1e-6,
            )


def draw(method: str, raw: dict[str, Any], inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Return the merged checkpoint, flat: these methods look at one tensor after the other."""
    base, *experts = inputs
    merged = {
        name: (
            merge_tensor(method, values, [expert[name] for expert in experts], raw, name=name)[
                0
            ].values
        )
        for name, values in base.items()
    }
    return to_flat(merged)


def recipe_of(case: Case) -> tuple[str, dict[str, Any]]:
    numbers = case["params"]
    if case["method"] == "dare_task_arithmetic":
        return "dare_linear", {
            "density": 1 - numbers["mask_rate"],
            "scale": numbers["scaling"],
            "rescale": "probability",
        }
    keys = {"density": numbers["density"], "rescale": "norm"}
    if "epsilon" in numbers:
        keys["epsilon"] = numbers["epsilon"]
    if case["method"].endswith("linear"):
        return case["method"], keys | {"normalize": numbers["normalize"]}
    return case["method"], keys | {
        "reduction": "mean" if numbers["normalize"] else "sum",
        "zero_sign": "positive",
    }


@cases("dare_task_arithmetic", "dare_linear", "dare_ties", "della_linear", "della")
def test_mean_and_spread_over_seeds_are_the_golden_ones(case: Case) -> None:
    name, raw = recipe_of(case)
    mean, stderr = expected(case, "mean"), expected(case, "stderr")
    assert mean is not None
    assert stderr is not None
    inputs = read_inputs(*input_folders(case))
    base = base_of(case).double()
    total, squares = torch.zeros_like(base), torch.zeros_like(base)
    for seed in range(NUM_DRAWS):
        change = draw(name, raw | {"seed": seed}, inputs).double() - base
        total += change
        squares += change**2
    found = total / NUM_DRAWS
    spread = ((squares / NUM_DRAWS - found**2).clamp(min=0) / (NUM_DRAWS - 1)).sqrt()
    stderr = stderr.double()
    width = (spread**2 + stderr**2).sqrt()
    varies = (width > 1e-9) & (stderr > 0)
    z = ((found - mean.double()) / width)[varies]
    assert 0.95 <= float(z.square().mean().sqrt()) <= 1.06
    assert float(z.abs().max()) < 5
    torch.testing.assert_close(found[~varies], mean.double()[~varies], rtol=0, atol=1e-6)
    ratio = float((NUM_DRAWS * spread[varies] ** 2).sum() / (200 * stderr[varies] ** 2).sum())
    assert ratio == pytest.approx(1, abs=0.05)
