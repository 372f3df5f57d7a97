"""What holds for every method whatever the numbers: order of experts, one expert, no change, equal
experts, rows, scale.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_tensor import merge_tensor

ALL = {
    "mmer": {},
    "tall_masks": {},
    "emr": {},
    "naive_mc": {},
    "linear": {},
    "task_arithmetic": {"scale": 0.5},
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5, "rescale": "norm"},
    "della": {},
    "della_linear": {"rescale": "norm"},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "pcb": {},
    "consensus": {},
    "ram": {},
    "ram_plus": {},
}
"""Every method of this file's kind, with numbers that make it do something."""
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
MASKS = ("mmer", "tall_masks", "emr")
WHOLE: dict[str, dict[str, Any]] = {
    "naive_mc": {},
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 1},
    "dare_linear": {"density": 1},
    "dare_ties": {"density": 1},
    "della": {"density": 1},
    "della_linear": {"density": 1},
    "breadcrumbs": {"density": 1},
    "breadcrumbs_ties": {"density": 1},
    "sce": {},
    "consensus": {"agreement": 1},
    "ram": {"epsilon": 0},
    "ram_plus": {"epsilon": 0},
}
"""Numbers with which a method keeps all of a single expert."""
AVERAGING: dict[str, dict[str, Any]] = {
    name: WHOLE[name] for name in ("naive_mc", "linear", "ties", "sce", "ram", "ram_plus")
} | {
    "breadcrumbs_ties": {"density": 1, "reduction": "mean"},
    "task_arithmetic": {"normalize": True},
}
NOT_HOMOGENEOUS = ("pcb", "ram", "ram_plus")
"""Methods that compare task vectors with an absolute size: a tanh, an epsilon."""
seeds = st.integers(0, 10**6)
fast = settings(deadline=None, max_examples=8)


def make(seed: int, *, num_experts: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base of zeros and experts with values whose sums are exact in float32 and whose magnitudes
    are all different.
    """
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randperm(6 * 20 * num_experts, generator=generator) + 1).float() / 1024
    signs = torch.randint(0, 2, values.shape, generator=generator) * 2 - 1
    return torch.zeros(6, 20), list((values * signs).reshape(num_experts, 6, 20))


def rebuilt(
    method: str,
    base: torch.Tensor,
    experts: list[torch.Tensor],
    raw: dict[str, Any],
    **options: Any,
) -> list[torch.Tensor]:
    """The merged tensor of a plain method, the rebuilt experts of one with masks."""
    merged, rescalers = merge_tensor(method, base, experts, raw, **options)
    values = merged.values.reshape(base.shape)
    if not merged.masks:
        return [values]
    factors = rescalers or (1.0,) * len(experts)
    return [
        base + factor * mask.reshape(base.shape) * values
        for factor, mask in zip(factors, merged.masks, strict=True)
    ]


@pytest.mark.parametrize("method", ALL)
@fast
@given(seeds, st.permutations(range(3)))
def test_the_order_of_experts_does_not_matter(method: str, seed: int, order: list[int]) -> None:
    base, experts = make(seed)
    names = ["a", "b", "c"]
    first = rebuilt(method, base, experts, ALL[method], names=names)
    other = rebuilt(
        method, base, [experts[i] for i in order], ALL[method], names=[names[i] for i in order]
    )
    expected = [first[i] for i in order] if method in MASKS else first
    for one, two in zip(expected, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", WHOLE)
@fast
@given(seeds)
def test_one_expert_kept_whole_is_the_result(method: str, seed: int) -> None:
    base, experts = make(seed, num_experts=1)
    torch.testing.assert_close(
        rebuilt(method, base, experts, WHOLE[method])[0], experts[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("method", MASKS)
@fast
@given(seeds)
def test_one_expert_of_a_build_with_masks_is_rebuilt_whole(method: str, seed: int) -> None:
    base, experts = make(seed, num_experts=1)
    raw = {"density": 1} if method == "mmer" else {}
    torch.testing.assert_close(
        rebuilt(method, base, experts, raw)[0], experts[0], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("method", ALL)
def test_experts_that_changed_nothing_leave_the_base(method: str) -> None:
    base = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    for values in rebuilt(method, base, [base.clone() for _ in range(3)], ALL[method]):
        torch.testing.assert_close(values, base, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", AVERAGING)
@fast
@given(seeds)
def test_equal_experts_average_to_themselves(method: str, seed: int) -> None:
    base, experts = make(seed)
    found = rebuilt(method, base, [experts[0].clone() for _ in range(3)], AVERAGING[method])[0]
    torch.testing.assert_close(found, experts[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", [name for name in ALL if name not in RANDOM])
@fast
@given(seeds, st.permutations(range(6)))
def test_permuted_rows_give_permuted_results(method: str, seed: int, order: list[int]) -> None:
    base, experts = make(seed)
    first = rebuilt(method, base, experts, ALL[method])
    other = rebuilt(method, base[order], [expert[order] for expert in experts], ALL[method])
    for one, two in zip(first, other, strict=True):
        assert one[order].equal(two)


@pytest.mark.parametrize("method", [name for name in ALL if name not in NOT_HOMOGENEOUS])
@fast
@given(seeds, st.sampled_from([0.25, 2.0, 8.0]))
def test_scaled_task_vectors_give_a_scaled_result(method: str, seed: int, factor: float) -> None:
    base, experts = make(seed)
    first = rebuilt(method, base, experts, ALL[method])
    other = rebuilt(method, base, [expert * factor for expert in experts], ALL[method])
    for one, two in zip(first, other, strict=True):
        torch.testing.assert_close(one * factor, two, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", RANDOM)
def test_random_numbers_depend_on_seed_expert_and_tensor_alone(method: str) -> None:
    base, experts = make(3)
    first = rebuilt(method, base, experts, ALL[method])[0]
    assert first.equal(rebuilt(method, base, experts, ALL[method])[0])
    for change in ({"name": "v"}, {"names": ["x", "y", "z"]}):
        assert not first.equal(rebuilt(method, base, experts, ALL[method], **change)[0])
    assert not first.equal(rebuilt(method, base, experts, ALL[method] | {"seed": 1})[0])
