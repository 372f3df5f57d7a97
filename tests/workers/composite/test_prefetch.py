"""The prefetcher stays within its window, keeps the order, and ends with its consumer."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from mmerge.manifests.errors import DamagedObject
from mmerge.manifests.stores.object_store import ObjectStore
from mmerge.manifests.stores.open import open_store
from mmerge.workers.composite import prefetch as prefetch_module
from mmerge.workers.composite.prefetch import (
    LOCAL_THREADS,
    REMOTE_THREADS,
    prefetch,
    read_threads,
)
from mmerge.workers.composite.weight_items import Item


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
    with prefetch(items, read, window_bytes=30, num_threads=4) as ready:
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

    with prefetch(
        make_items(1 << 40, 1 << 40, 1 << 40), read, window_bytes=None, num_threads=3
    ) as ready:
        assert list(ready) == ["t0", "t1", "t2"]


def test_what_is_added_while_others_are_read_comes_behind_them_within_the_same_window() -> None:
    begun: list[str] = []
    items = make_items(10, 10, 10, 10)

    def read(item: Item) -> str:
        begun.append(item.name)
        return item.name

    with prefetch(items[:1], read, window_bytes=20, num_threads=1) as ready:
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

    with prefetch(make_items(*[10] * 50), read, window_bytes=20, num_threads=2) as ready:
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
        with prefetch(make_items(*[10] * 50), read, window_bytes=20, num_threads=2):
            assert begun.wait(10)
            raise ValueError("the caller's own")

    before = set(threading.enumerate())  # stores have threads of their own, which stay
    with pytest.raises(ValueError, match="the caller's own"):
        fail()
    assert seen[0] == "t0"
    assert len(seen) <= 2
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("cores", "ranks_here", "expected"),
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    ranks_here: str | None,
    expected: int,
) -> None:
    monkeypatch.setattr(prefetch_module, "num_cores", lambda: cores)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_here:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    assert read_threads(open_store(str(tmp_path))) == expected


@pytest.mark.parametrize("cores", [1, 64])
def test_a_store_over_a_network_is_read_by_as_many_threads_on_any_machine(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(prefetch_module, "num_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_threads(ObjectStore("s3://bucket/store", MemoryStore())) == REMOTE_THREADS
