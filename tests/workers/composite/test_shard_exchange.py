"""Parts of tensors put together are the whole, and bytes are shared evenly over ranks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from typing_extensions import override

from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.composite.shard_exchange import assign_ranks, cut, part_shape, scatter_item
from mmerge.workers.composite.tensor_parallel import TensorParallelPlan
from mmerge.workers.composite.weight_items import Field, Item
from mmerge.workers.families.llama import LLAMA
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows, unpack_rows


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_shares_are_even_within_the_largest_item(num_ranks: int) -> None:
    sizes = [(index * 7919) % 1000 + 1 for index in range(60)]
    owners = assign_ranks(sizes, num_ranks=num_ranks)
    loads = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(num_ranks)
    ]
    assert max(loads) - min(loads) <= max(sizes)
    assert owners == assign_ranks(sizes, num_ranks=num_ranks)
    loads = [500 * rank for rank in range(num_ranks)]
    more = assign_ranks(sizes, num_ranks=num_ranks, loads=loads)
    assert num_ranks == 1 or sum(owner == 0 for owner in more) >= sum(
        owner == num_ranks - 1 for owner in more
    )


@pytest.mark.parametrize(
    ("module", "width"),
    [
        ("self_attn.o_proj", 64),
        ("self_attn.o_proj", 24),
        ("self_attn.q_proj", 24),
        ("lm_head", 24),
        ("embed_tokens", 20),
    ],
)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_parts_of_weights_and_masks_put_together_are_the_whole(
    module: str, width: int, num_ranks: int
) -> None:
    plan = TensorParallelPlan(num_ranks, 4, 4, 6, 48, LLAMA)
    rows = 41 if module in ("lm_head", "embed_tokens") else 24
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator)
    masks = torch.rand(3, rows, width, generator=generator) < 0.4
    packed = torch.stack([pack_rows(pack_mask(mask), mask.shape) for mask in masks])
    fields: dict[str, tuple[Field, torch.Tensor]] = {
        "text": (Field("text", weight.dtype, tuple(weight.shape)), weight),
        "masks": (Field("masks", torch.uint8, tuple(packed.shape)), packed),
    }
    found: dict[str, list[Any]] = {"text": [], "masks": []}
    along = ""
    for rank in range(num_ranks):
        part = plan.part_of(f"model.layers.0.{module}.weight", tuple(weight.shape), rank=rank)
        along = part.along
        for name, (field, value) in fields.items():
            piece = cut(value, field, part, is_vector=False)
            assert tuple(piece.shape) == part_shape(field, part, is_vector=False)
            part_width = part.size if along == "columns" else width
            found[name].append(unpack_rows(piece, part_width) if name == "masks" else piece)
    dim = -1 if along == "columns" else -2
    assert torch.cat(found["text"], dim=dim)[:rows].equal(weight)
    assert torch.cat(found["masks"], dim=dim)[:, :rows].equal(masks)


class CountingGroup(ProcessGroup):
    """Rank 1 of two, which owns everything; counts the parts alive whenever one is consumed."""

    rank, num_ranks = 1, 2

    def __init__(self) -> None:
        self.alive: list[int] = []

    @override
    def scatter(
        self, parts: Iterable[torch.Tensor] | None, *, source: int, num_bytes: int
    ) -> torch.Tensor:
        assert parts is not None
        held: list[weakref.ref[torch.Tensor]] = []
        local_part = torch.empty(0)
        for rank, part in enumerate(parts):
            held.append(weakref.ref(part))
            self.alive.append(sum(each() is not None for each in held))
            if rank == self.rank:
                local_part = part
            del part
        return local_part


def test_an_owner_never_holds_two_parts_at_once() -> None:
    field = Field("value", torch.float32, (64, 8))
    item = Item("model.layers.0.self_attn.q_proj.weight", "plain", (field,), 64 * 8 * 4)
    whole = torch.arange(64 * 8, dtype=torch.float32).reshape(64, 8)
    group = CountingGroup()
    plan = TensorParallelPlan(2, 4, 4, 16, 16, LLAMA)
    found = scatter_item(item, iter([{"value": whole}]), group=group, owner=1, plan=plan)
    assert found["value"].equal(whole[32:])
    assert group.alive == [1, 1]
