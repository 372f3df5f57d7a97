"""What is read ahead stays within its window, shares are even, and parts put together are the
whole.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from obstore.store import MemoryStore
from typing_extensions import override

from mmerge.manifests.errors import DamagedObject
from mmerge.manifests.stores.object_store import ObjectStore
from mmerge.manifests.stores.open import open_store
from mmerge.workers.composite import weight_items as fetch
from mmerge.workers.composite.process_group import Ranks
from mmerge.workers.composite.tensor_parallel import Division
from mmerge.workers.composite.weight_items import (
    LOCAL_THREADS,
    REMOTE_THREADS,
    Field,
    Item,
    cut,
    deliver,
    part_shape,
    read_ahead,
    read_threads,
    share_out,
)
from mmerge.workers.families.llama import LLAMA
from mmerge.workers.reconstruction.bitmask import pack_mask, pack_rows, unpack_rows


def make_items(*sizes: int) -> list[Item]:
    return [Item(f"t{index}", "plain", (), size) for index, size in enumerate(sizes)]


def test_reading_ahead_holds_no_more_than_its_window_or_one_item() -> None:
    items = make_items(10, 10, 10, 50, 10, 10, 10, 10)
    lock, held, most = threading.Lock(), [0], [0]

    def read(item: Item) -> Item:
        with lock:
            held[0] += item.num_bytes
            most[0] = max(most[0], held[0])
        time.sleep(0.002)
        return item

    found = []
    with read_ahead(items, read, window_bytes=30, num_threads=4) as ready:
        for item in ready:
            found.append(item)
            time.sleep(0.002)
            with lock:
                held[0] -= item.num_bytes
    assert found == items
    assert most[0] <= 50


def test_without_a_window_nothing_waits_for_what_was_read_before_it() -> None:
    met = threading.Barrier(3)

    def read(item: Item) -> str:
        met.wait(10)  # all three are being read at once, or this fails
        return item.name

    with read_ahead(
        make_items(1 << 40, 1 << 40, 1 << 40), read, window_bytes=None, num_threads=3
    ) as ready:
        assert list(ready) == ["t0", "t1", "t2"]


def test_what_is_added_while_others_are_read_comes_behind_them_within_the_same_window() -> None:
    begun: list[str] = []
    items = make_items(10, 10, 10, 10)

    def read(item: Item) -> str:
        begun.append(item.name)
        return item.name

    with read_ahead(items[:1], read, window_bytes=20, num_threads=1) as ready:
        ready.add(items[1:])
        assert next(ready) == "t0"
        assert set(begun) <= {"t0", "t1"}, "the first is still held"
        assert list(ready) == ["t1", "t2", "t3"]
    assert begun == ["t0", "t1", "t2", "t3"]


def test_an_error_of_a_reading_thread_reaches_the_caller_and_ends_the_rest() -> None:
    seen = []

    def read(item: Item) -> str:
        seen.append(item.name)
        if item.name == "t1":
            raise DamagedObject("t1 is damaged")
        return item.name

    with read_ahead(make_items(*[10] * 50), read, window_bytes=20, num_threads=2) as ready:
        assert next(ready) == "t0"
        with pytest.raises(DamagedObject, match="t1 is damaged"):
            next(ready)
    assert len(seen) < 10


def test_threads_read_before_the_first_is_asked_for_and_end_when_the_caller_fails() -> None:
    begun = threading.Event()
    seen = []

    def read(item: Item) -> str:
        seen.append(item.name)
        begun.set()
        return item.name

    def fail() -> None:
        with read_ahead(make_items(*[10] * 50), read, window_bytes=20, num_threads=2):
            assert begun.wait(10)
            raise ValueError("the caller's own")

    before = set(threading.enumerate())  # stores have threads of their own, which stay
    with pytest.raises(ValueError, match="the caller's own"):
        fail()
    assert seen[0] == "t0"
    assert len(seen) <= 2
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("cores", "ranks_here", "wanted"),
    [
        (1, None, 1),
        (2, None, 2),
        (6, None, 6),
        (64, None, LOCAL_THREADS),
        (8, "2", 4),
        (8, "3", 2),
        (2, "4", 1),
    ],
)
def test_a_local_store_is_read_by_one_thread_per_core_shared_by_the_ranks_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, ranks_here: str | None, wanted: int
) -> None:
    monkeypatch.setattr(fetch, "num_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    assert read_threads(open_store(str(tmp_path))) == wanted


@pytest.mark.parametrize("cores", [1, 64])
def test_a_store_over_a_network_is_read_by_as_many_threads_on_any_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(fetch, "num_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_threads(ObjectStore("s3://bucket/store", MemoryStore())) == REMOTE_THREADS


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_shares_are_even_within_the_largest_item(num_ranks: int) -> None:
    sizes = [(index * 7919) % 1000 + 1 for index in range(60)]
    owners = share_out(sizes, num_ranks=num_ranks)
    loads = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(num_ranks)
    ]
    assert max(loads) - min(loads) <= max(sizes)
    assert owners == share_out(sizes, num_ranks=num_ranks)
    taken = [500 * rank for rank in range(num_ranks)]
    more = share_out(sizes, num_ranks=num_ranks, taken=taken)
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
    division = Division(num_ranks, 4, 4, 6, 48, LLAMA)
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
        part = division.part_of(f"model.layers.0.{module}.weight", tuple(weight.shape), rank=rank)
        along = part.along
        for name, (field, value) in fields.items():
            piece = cut(value, field, part, is_vector=False)
            assert tuple(piece.shape) == part_shape(field, part, is_vector=False)
            own_width = part.size if along == "columns" else width
            found[name].append(unpack_rows(piece, own_width) if name == "masks" else piece)
    dim = -1 if along == "columns" else -2
    assert torch.cat(found["text"], dim=dim)[:rows].equal(weight)
    assert torch.cat(found["masks"], dim=dim)[:, :rows].equal(masks)


class PickyRanks(Ranks):
    """Rank 1 of two, which owns everything; counts live parts whenever one is taken."""

    rank, num_ranks = 1, 2

    def __init__(self) -> None:
        self.alive: list[int] = []

    @override
    def scatter(
        self, parts: Iterable[torch.Tensor] | None, *, source: int, num_bytes: int
    ) -> torch.Tensor:
        assert parts is not None
        held: list[weakref.ref[torch.Tensor]] = []
        own = torch.empty(0)
        for rank, part in enumerate(parts):
            held.append(weakref.ref(part))
            self.alive.append(sum(each() is not None for each in held))
            if rank == self.rank:
                own = part
            del part
        return own


def test_an_owner_makes_one_part_after_the_other() -> None:
    field = Field("value", torch.float32, (64, 8))
    item = Item("model.layers.0.self_attn.q_proj.weight", "plain", (field,), 64 * 8 * 4)
    whole = torch.arange(64 * 8, dtype=torch.float32).reshape(64, 8)
    ranks = PickyRanks()
    division = Division(2, 4, 4, 16, 16, LLAMA)
    found = deliver(item, iter([{"value": whole}]), ranks=ranks, owner=1, division=division)
    assert found["value"].equal(whole[32:])
    assert ranks.alive == [1, 1]
