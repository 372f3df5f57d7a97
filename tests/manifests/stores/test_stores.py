from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.stores.create_check import check_store
from mmerge.manifests.stores.object_store import Store, open_store
from mmerge.manifests.stores.prefetch import read_in_parts


@pytest.fixture(params=["memory", "local", "moto", "ceph", "swift", "azurite"])
def store(request: pytest.FixtureRequest, places: Any) -> Store:
    """One contract, every store."""
    return open_store(places.make(request.param), create=True)


def test_what_was_put_is_read_whole_and_in_ranges(store: Store) -> None:
    store.put("a/b.bin", bytes(range(100)))
    assert store.read("a/b.bin") == bytes(range(100))
    assert bytes(store.read_range("a/b.bin", offset=10, num_bytes=5)) == bytes(range(10, 15))
    assert store.read_start("a/b.bin", num_bytes=7) == (bytes(range(7)), 100)
    assert store.read_start("a/b.bin", num_bytes=700) == (bytes(range(100)), 100)
    with pytest.raises(NotFound):
        store.read_start("a/c.bin", num_bytes=7)
    store.put("a/empty.bin", b"")
    with pytest.raises(StoreError, match=r"a/empty\.bin: "):
        store.read_start("a/empty.bin", num_bytes=7)
    assert store.num_bytes("a/b.bin") == 100
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")


def test_put_new_refuses_to_replace_and_leaves_the_first(store: Store) -> None:
    store.put_new("a", b"first")
    with pytest.raises(AlreadyExists, match="a: already exists"):
        store.put_new("a", b"second")
    assert store.read("a") == b"first"


def test_of_many_writers_at_once_exactly_one_creates_and_its_bytes_stay(
    store: Store, request: pytest.FixtureRequest
) -> None:
    def create(number: int) -> bool:
        try:
            store.put_new("contested", b"%d" % number * 1000)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, range(8)))
    is_racy = request.node.callspec.params["store"] == "swift"  # it looks first and writes later
    assert sum(won) >= 1 if is_racy else sum(won) == 1
    assert store.read("contested") in {
        b"%d" % number * 1000 for number, has_won in enumerate(won) if has_won
    }
    assert check_store(store) != is_racy
    assert store.honours_create != is_racy
    assert not list(store.list("probe"))


def test_ranges_are_read_together_forward_and_in_large_parts(store: Store) -> None:
    data = bytes(range(256)) * (25 << 12)  # 25 MiB: several parts of the forward reader
    with store.open_writer("large") as out:
        for start in range(0, len(data), 3 << 20):
            out.write(data[start : start + (3 << 20)])
    ranges = [(5, 10), (15, 3), (20_000_000, 7), (0, 1)]
    assert [bytes(found) for found in store.read_ranges("large", ranges)] == [
        data[at : at + size] for at, size in ranges
    ]
    told: list[memoryview] = []
    assert (
        store.read_range("large", offset=3, num_bytes=len(data) - 5, on_part=told.append)
        == data[3:-2]
    )
    assert b"".join(told) == data[3:-2]
    with pytest.raises(StoreError, match="it ends at 26214400"):
        store.read_range("large", offset=5 << 20, num_bytes=len(data))
    with pytest.raises(NotFound):
        store.read_range("larger", offset=5 << 20, num_bytes=len(data))
    begin, stop, step = 1000, len(data) - 1000, 3_000_001
    for offset in range(begin, stop, step):
        size = min(step, stop - offset)
        assert (
            store.read_forward("large", offset=offset, num_bytes=size, start=begin, stop=stop)
            == data[offset : offset + size]
        )
    assert (
        store.read_forward("large", offset=begin, num_bytes=9, start=begin, stop=stop)
        == data[begin : begin + 9]
    )
    with pytest.raises(StoreError, match="at most 1,000 are read"):
        store.read("large", max_bytes=1000)


def test_a_large_range_is_put_together_from_parts_in_their_order() -> None:
    data = bytes(range(251)) * (600 << 10)
    asked: list[tuple[int, int]] = []

    def read(offset: int, part: NDArray[np.uint8]) -> None:
        asked.append((offset, len(part)))
        time.sleep(0.02 if len(asked) % 3 == 0 else 0)
        part[:] = np.frombuffer(data, np.uint8)[offset : offset + len(part)]

    told: list[memoryview] = []
    assert read_in_parts(read, 3, len(data) - 5, on_part=told.append) == data[3:-2]
    assert b"".join(told) == data[3:-2]
    assert len(asked) == len(told) == 19
    assert max(num_bytes for _, num_bytes in asked) == 8 << 20


def test_a_part_that_fails_ends_a_large_range_with_its_error() -> None:
    def read(offset: int, part: NDArray[np.uint8]) -> None:
        if offset > 30 << 20:
            raise StoreError("broke off")

    with pytest.raises(StoreError, match="broke off"):
        read_in_parts(read, 0, 100 << 20, on_part=len)


def test_a_listing_tells_size_and_time(store: Store) -> None:
    store.put("refs/x", b"12345")
    (found,) = store.list_objects("refs")
    assert (found.key, found.num_bytes) == ("refs/x", 5)
    assert abs((datetime.now(timezone.utc) - found.modified).total_seconds()) < 120


def test_a_streamed_object_appears_only_when_its_writer_closes_without_error(store: Store) -> None:
    with store.open_writer("done") as out:
        out.write(b"x" * 20_000_000)
        out.write(memoryview(b"yz"))
        assert not store.exists("done")
    assert store.num_bytes("done") == out.num_bytes == 20_000_002

    def fail() -> None:
        with store.open_writer("half") as out:
            out.write(b"x" * 20_000_000)
            raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        fail()
    assert not store.exists("half")
    assert sorted(store.list()) == ["done"]


def test_a_missing_object_and_a_range_behind_the_end_are_errors(store: Store) -> None:
    with pytest.raises(NotFound, match="nothing: not found"):
        store.read("nothing")
    store.put("short", b"123")
    with pytest.raises(StoreError, match="short"):
        store.read_range("short", offset=2, num_bytes=5)
    with pytest.raises(StoreError, match="short") as caught:
        store.read_range("short", offset=200, num_bytes=5)
    assert not isinstance(caught.value, StoreUnavailable), "the server was asked again and again"


@pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/../b", "", ".", "a\\b"])
def test_a_key_cannot_leave_the_store(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="no valid object name"):
        store.put(key, b"")


def test_listing_is_below_a_folder_and_deleting_twice_is_no_error(store: Store) -> None:
    for key in ("refs/a/1", "refs/b/1", "other"):
        store.put(key, b"1")
    assert sorted(store.list("refs")) == ["refs/a/1", "refs/b/1"]
    store.delete("other")
    store.delete("other")
    assert sorted(store.list()) == ["refs/a/1", "refs/b/1"]


def test_identity_changes_when_an_object_is_replaced(store: Store) -> None:
    store.put("a", b"one")
    before = store.identity("a")
    assert store.identity("a") == before
    time.sleep(0.01)
    store.put("a", b"three")
    assert store.identity("a") != before


def test_a_missing_folder_a_file_and_an_unwritable_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        open_store(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        open_store(str(tmp_path / "file"), create=True)
    with pytest.raises(StoreError, match="cannot be made"):
        open_store(str(tmp_path / "file" / "below"), create=True)
