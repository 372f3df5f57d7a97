"""Which methods give equal bits in float32 for every order of the experts: docs/arithmetic.md says.

Random values show how sums round; values that cancel show elected signs that a rounding decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from one_tensor import merge_tensor

from mmerge.workers.methods import find_method
from mmerge.workers.methods.registry import _DEFINITIONS

PAGE = Path(__file__).resolve().parent.parent.parent.parent / "docs" / "arithmetic.md"
NAME = "model.layers.0.self_attn.q_proj.weight"
"""A matrix by its name: methods of whole matrices average all other tensors."""
SHAPE = (24, 32)
PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.6},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "slerp": {"t": 0.3},
    "adamms": {"alpha": 0.3},
}


def read_table() -> dict[str, list[str]]:
    """Return the methods of each row of the page's table, by what another order changes."""
    section = PAGE.read_text().partition("another order of its experts |\n")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines()[1:]]
    # "two experts: no bit; three and more: …" is known by its first words.
    return {effect.partition(":")[0]: re.findall("`([a-z_]+)`", names) for names, effect in rows}


TABLE = read_table()
NO_BIT = "no bit"
ROUNDING = "two experts"
ALWAYS_ROUNDING = "rounding"
ANOTHER_MERGE = "another merge"
ONE_EXPERT = "takes one expert"


def make_inputs(num_experts: int) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Yield bases and experts: of random values, and of values whose sums cancel."""
    generator = torch.Generator().manual_seed(num_experts)
    for _ in range(3):
        base = torch.randn(SHAPE, generator=generator)
        noise = torch.randn((num_experts, *SHAPE), generator=generator)
        yield base, list(base + 0.1 * noise)
    values = 1 + torch.rand(SHAPE, generator=generator)
    yield torch.zeros(SHAPE), [factor * values for factor in (1e8, 1.0, -1e8)[:num_experts]]


def merge(method: str, base: torch.Tensor, experts: Sequence[torch.Tensor], names: Any) -> Any:
    """Return the merged values and the mask of each expert by its name."""
    merged, _ = merge_tensor(method, base, experts, PARAMETERS.get(method), names=names, name=NAME)
    return merged.values.reshape(SHAPE), dict(zip(names, merged.masks or (), strict=False))


def is_changed(method: str, num_experts: int) -> bool:
    """Return whether some order of some experts gives other bits."""
    names = [f"expert{index}" for index in range(num_experts)]
    for base, experts in make_inputs(num_experts):
        values, masks = merge(method, base, experts, names)
        for order in permutations(range(num_experts)):
            other_values, other_masks = merge(
                method, base, [experts[i] for i in order], [names[i] for i in order]
            )
            if not torch.equal(values, other_values):
                return True
            if any(not torch.equal(masks[name], other_masks[name]) for name in masks):
                return True
    return False


def test_the_page_names_every_method_once() -> None:
    assert set(TABLE) == {NO_BIT, ROUNDING, ALWAYS_ROUNDING, ANOTHER_MERGE, ONE_EXPERT}
    assert sorted(chain.from_iterable(TABLE.values())) == sorted(_DEFINITIONS)


@pytest.mark.parametrize("method", sorted({*TABLE[NO_BIT], *TABLE[ROUNDING]} - {"damc"}))
def test_two_experts_can_be_exchanged_without_changing_a_bit(method: str) -> None:
    assert not is_changed(method, 2)


@pytest.mark.parametrize("method", TABLE[ROUNDING])
def test_the_order_of_three_experts_changes_bits(method: str) -> None:
    """Otherwise the page would say less than is true."""
    assert is_changed(method, 3)


@pytest.mark.parametrize("method", [*TABLE[ALWAYS_ROUNDING], *TABLE[ANOTHER_MERGE]])
def test_the_order_of_two_experts_changes_bits(method: str) -> None:
    assert is_changed(method, 2)


def test_methods_without_an_order_take_one_expert_two_or_merge_nothing() -> None:
    assert {find_method(name).max_experts for name in TABLE[ONE_EXPERT]} == {1}
    assert TABLE[NO_BIT] == ["nuslerp", "damc"]
    assert find_method("nuslerp").max_experts == 2
    assert find_method("damc").kind == "adapters"
