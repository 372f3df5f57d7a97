"""A build written as float16 holds no infinity that its inputs do not hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmerge.manifests.errors import NonFiniteError
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.workers.reconstruction.build_reader import BuildReader
from mmerge.workers.reconstruction.weights import rebuild_weight, text_weight

NAME = "model.layers.1.mlp.up_proj.weight"


def make_recipe(lab: Any, *, values: tuple[float, float], base: float = 0.0) -> dict[str, Any]:
    lab.dtype = torch.float16
    raw: dict[str, Any] = lab.make_all(2)
    lab.base[NAME][3, 5] = base
    lab.write("base", lab.base, lab.config)
    for seed, (name, value) in enumerate(zip(("image", "audio"), values, strict=True)):

        def change(tensors: dict[str, torch.Tensor], value: float = value) -> None:
            tensors["language_model." + NAME][3, 5] = value

        lab.make_expert(name, seed, change=change)
    return raw


def build(lab: Any, raw: dict[str, Any]) -> BuildReader:
    run(make_plan(read_recipe(lab.write_recipe(raw))))
    return BuildReader(str(lab.folder / "store"))


@pytest.mark.parametrize("method", ["task_arithmetic", "mmer", "tall_masks", "consensus"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflow_names_tensor_position_and_experts(lab: Any, method: str, sign: int) -> None:
    raw = make_recipe(lab, values=(sign * 60000.0, sign * 60000.0), base=-sign * 60000.0)
    with pytest.raises(NonFiniteError) as raised:
        build(lab, raw | {"method": method})
    message = str(raised.value)
    assert f"{NAME}: merged, the value at [3, 5] overflows float16" in message
    assert f"expert 'image' has {sign * 60000}, expert 'audio' has {sign * 60000}" in message
    assert "'dtype: bfloat16'" in message


@pytest.mark.parametrize("method", ["task_arithmetic", "mmer"])
def test_the_same_build_is_finite_in_a_wider_dtype(lab: Any, method: str) -> None:
    raw = make_recipe(lab, values=(60000.0, 60000.0))
    reader = build(lab, raw | {"method": method, "dtype": "bfloat16"})
    assert bool(text_weight(reader, NAME).isfinite().all())


@pytest.mark.parametrize("method", ["task_arithmetic", "mmer", "tall_masks"])
def test_infinities_that_a_recipe_keeps_are_no_overflow(lab: Any, method: str) -> None:
    raw = make_recipe(lab, values=(float("inf"), 1.0))
    reader = build(lab, raw | {"method": method, "non_finite": "keep"})
    assert not bool(rebuild_weight(reader, NAME, expert="image").isfinite().all())


def test_a_sum_of_base_and_task_vector_that_overflows_is_found(lab: Any) -> None:
    # Each of θ₀ and τ⋆ is finite; only the weights that a composite forms are not.
    raw = make_recipe(lab, values=(65000.0, 65000.0), base=30000.0)
    with pytest.raises(NonFiniteError, match="overflows float16"):
        build(lab, raw | {"method": "mmer", "density": 1.0})
