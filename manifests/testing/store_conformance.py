"""What every store has to do, as pytest classes to derive from.

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def store(self, tmp_path: Path) -> Store:
            return MyStore.open(f"my://{tmp_path}/new", create=True)

A store that can only be read derives from `ReadableStoreConformance`, and has a fixture `fill`
instead: a function that takes objects by key, and returns a store that holds these and no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import numpy as np
import pytest

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.stores.base import ReadableStore, Store
from mmerge.manifests.stores.create_check import check_store

Fill = Callable[[Mapping[str, bytes]], ReadableStore]
HUNDRED_BYTES = bytes(range(100))
LARGE_BYTES = 25 << 20
"""Several parts of a prefetching reader, and of a multipart upload."""
CLOCK_SECONDS = 120
"""How far a server's clock may be from ours."""
NUM_WRITERS = 8


def make_large_object() -> bytes:
    """Return 25 MiB of random bytes, equal at every call."""
    return np.random.default_rng(0).bytes(LARGE_BYTES)


class ReadableStoreConformance:
    """The reading half of the contract; needs the fixture `fill`."""

    def test_an_object_is_read_whole_and_in_ranges(self, fill: Fill) -> None:
        """All verbs that read return the bytes that were stored."""
        store = fill({"a/b.bin": HUNDRED_BYTES})
        assert store.read("a/b.bin") == HUNDRED_BYTES
        assert store.read_range("a/b.bin", offset=10, num_bytes=5) == HUNDRED_BYTES[10:15]
        assert store.read_range("a/b.bin", offset=0, num_bytes=7) == HUNDRED_BYTES[:7]
        assert not store.read_range("a/b.bin", offset=3, num_bytes=0)
        assert store.num_bytes("a/b.bin") == 100
        assert store.exists("a/b.bin")
        assert not store.exists("a/c.bin")

    def test_the_start_of_an_object_comes_with_its_size(self, fill: Fill) -> None:
        """`read_start` returns less where the object is shorter, and refuses an empty one."""
        store = fill({"full": HUNDRED_BYTES, "empty": b""})
        for num_bytes in (7, 700):
            start, object_bytes = store.read_start("full", num_bytes=num_bytes)
            assert start == HUNDRED_BYTES[:num_bytes]
            assert object_bytes == 100
        with pytest.raises(NotFound):
            store.read_start("missing", num_bytes=7)
        with pytest.raises(StoreError, match="empty: "):
            store.read_start("empty", num_bytes=7)

    def test_several_ranges_of_one_object_come_in_their_order(self, fill: Fill) -> None:
        """`read_ranges` accepts neighbours, distant ranges and any order."""
        data = make_large_object()
        store = fill({"large": data})
        ranges = [(5, 10), (15, 3), (20_000_000, 7), (0, 1)]
        parts = store.read_ranges("large", ranges)
        assert [bytes(part) for part in parts] == [
            data[offset : offset + num_bytes] for offset, num_bytes in ranges
        ]
        assert not store.read_ranges("large", [])

    def test_parts_of_a_large_range_are_reported_in_order(self, fill: Fill) -> None:
        """`on_part` receives exactly the bytes that are returned."""
        data = make_large_object()
        store = fill({"large": data})
        parts: list[memoryview] = []
        whole = store.read_range("large", offset=3, num_bytes=len(data) - 5, on_part=parts.append)
        assert whole == data[3:-2]
        assert b"".join(parts) == data[3:-2]

    def test_a_range_is_read_forward_in_steps(self, fill: Fill) -> None:
        """`read_forward` may start again after the last byte."""
        data = make_large_object()
        store = fill({"large": data})
        start, stop, step = 1000, len(data) - 1000, 3_000_001
        for offset in [*range(start, stop, step), start]:
            num_bytes = min(step, stop - offset)
            part = store.read_forward(
                "large", offset=offset, num_bytes=num_bytes, start=start, stop=stop
            )
            assert part == data[offset : offset + num_bytes]

    @pytest.mark.parametrize("block_bytes", [7, 64, 1 << 20])
    @pytest.mark.parametrize("is_kept", [False, True])
    def test_a_range_is_read_in_blocks(self, fill: Fill, block_bytes: int, is_kept: bool) -> None:
        """`read_blocks` yields whole blocks and a shorter last one, in `into` if given."""
        store = fill({"a": HUNDRED_BYTES})
        into = np.zeros(90, np.uint8) if is_kept else None
        blocks = store.read_blocks("a", offset=5, num_bytes=90, block_bytes=block_bytes, into=into)
        sizes, copies = [], []
        for block in blocks:
            sizes.append(len(block))
            copies.append(block.tobytes())
        assert b"".join(copies) == HUNDRED_BYTES[5:95]
        assert all(size == block_bytes for size in sizes[:-1])
        if into is not None:
            assert into.tobytes() == HUNDRED_BYTES[5:95]

    def test_a_missing_object_is_not_found(self, fill: Fill) -> None:
        """Errors name the key."""
        store = fill({"a": b"1"})
        with pytest.raises(NotFound, match="missing: not found"):
            store.read("missing")
        with pytest.raises(NotFound):
            store.read_range("missing", offset=5 << 20, num_bytes=LARGE_BYTES)
        with pytest.raises(NotFound):
            store.identity("missing")

    def test_a_range_beyond_the_end_is_an_error_and_not_retried(self, fill: Fill) -> None:
        """StoreUnavailable would make callers ask again and again."""
        store = fill({"short": b"123", "large": make_large_object()})
        for offset, num_bytes in [(2, 5), (200, 5)]:
            with pytest.raises(StoreError, match="short") as caught:
                store.read_range("short", offset=offset, num_bytes=num_bytes)
            assert not isinstance(caught.value, StoreUnavailable)
        with pytest.raises(StoreError, match=f"it ends at {LARGE_BYTES}"):
            store.read_range("large", offset=5 << 20, num_bytes=LARGE_BYTES)

    def test_an_object_beyond_the_limit_is_not_read(self, fill: Fill) -> None:
        """`read` takes memory only for what its caller expects."""
        store = fill({"large": bytes(1001)})
        with pytest.raises(StoreError, match="at most 1,000 are read"):
            store.read("large", max_bytes=1000)

    @pytest.mark.parametrize("key", ["../x", "/x", "a//b", "a/../b", "", ".", "a\\b"])
    def test_a_key_cannot_leave_the_store(self, fill: Fill, key: str) -> None:
        """Every verb checks its key."""
        store = fill({"a": b"1"})
        with pytest.raises(StoreError, match="no valid object name"):
            store.read(key)
        with pytest.raises(StoreError, match="no valid object name"):
            store.read_range(key, offset=0, num_bytes=1)
        with pytest.raises(StoreError, match="no valid object name"):
            store.num_bytes(key)

    def test_a_listing_is_below_a_folder(self, fill: Fill) -> None:
        """A prefix is a whole folder name; sizes are listed."""
        store = fill({"refs/a/1": b"1", "refs/b/1": b"12", "refsx": b"3", "other": b"4"})
        assert sorted(store.list("refs")) == ["refs/a/1", "refs/b/1"]
        assert sorted(store.list()) == ["other", "refs/a/1", "refs/b/1", "refsx"]
        sizes = {listed.key: listed.num_bytes for listed in store.list_objects("refs")}
        assert sizes == {"refs/a/1": 1, "refs/b/1": 2}
        assert not list(store.list("nothing"))

    def test_a_store_is_opened_again_by_its_uri(self, fill: Fill) -> None:
        """Workers open the store of the driver by `uri` alone."""
        store = fill({"a": b"1"})
        again = type(store).open(store.uri, create=False)
        assert again.uri == store.uri
        assert again.read("a") == b"1"

    def test_the_identity_of_an_unchanged_object_stays(self, fill: Fill) -> None:
        """Cached scans of inputs are found by it."""
        store = fill({"a": b"1"})
        assert store.identity("a") == store.identity("a")


class StoreConformance(ReadableStoreConformance):
    """The whole contract; needs the fixture `store`, a new and empty store for each test."""

    @pytest.fixture
    def has_atomic_create(self) -> bool:
        """Whether the server lets exactly one of several concurrent writers create a key."""
        return True

    @pytest.fixture
    def fill(self, store: Store) -> Fill:
        """Put the objects."""

        def put_all(objects: Mapping[str, bytes]) -> Store:
            for key, data in objects.items():
                store.put(key, data)
            return store

        return put_all

    def test_put_new_refuses_to_replace_and_leaves_the_first(self, store: Store) -> None:
        """Create never overwrites."""
        store.put_new("a", b"first")
        with pytest.raises(AlreadyExists, match="a: already exists"):
            store.put_new("a", b"second")
        assert store.read("a") == b"first"

    def test_exactly_one_of_many_writers_creates_and_its_bytes_stay(
        self, store: Store, has_atomic_create: bool
    ) -> None:
        """The commit of a build rests on this."""

        def create(number: int) -> bool:
            try:
                store.put_new("contested", b"%d" % number * 1000)
            except AlreadyExists:
                return False
            return True

        with ThreadPoolExecutor(NUM_WRITERS) as pool:
            results = list(pool.map(create, range(NUM_WRITERS)))
        winners = [number for number, has_created in enumerate(results) if has_created]
        assert winners
        assert len(winners) == 1 or not has_atomic_create
        assert store.read("contested") in [b"%d" % number * 1000 for number in winners]

    def test_the_check_of_a_store_finds_whether_create_is_atomic(
        self, store: Store, has_atomic_create: bool
    ) -> None:
        """A remote store keeps the verdict, and nothing else."""
        assert check_store(store) == has_atomic_create
        assert check_store(store) == has_atomic_create
        assert len(list(store.list("probe"))) == store.is_remote

    def test_put_replaces_and_changes_the_identity(self, store: Store) -> None:
        """A replaced object is another one, also of equal size."""
        store.put("a", b"one")
        before = store.identity("a")
        time.sleep(0.01)
        store.put("a", b"two")
        assert store.read("a") == b"two"
        if not store.is_remote:  # a server's times may be of whole seconds
            assert store.identity("a") != before
        store.put("a", b"three")
        assert store.identity("a") != before

    def test_a_listing_has_the_time_of_the_last_change(self, store: Store) -> None:
        """Garbage collection compares these times."""
        store.put("refs/x", b"12345")
        (listed,) = store.list_objects("refs")
        age = datetime.now(timezone.utc) - listed.modified
        assert abs(age.total_seconds()) < CLOCK_SECONDS

    def test_deleting_twice_is_no_error(self, store: Store) -> None:
        """Two collections may delete the same object."""
        store.put("a", b"1")
        store.put("b", b"1")
        store.delete("a")
        store.delete("a")
        assert list(store.list()) == ["b"]

    @pytest.mark.parametrize("key", ["../x", "/x", "a//b", "", "."])
    def test_a_written_key_cannot_leave_the_store(self, store: Store, key: str) -> None:
        """Every verb checks its key."""
        with pytest.raises(StoreError, match="no valid object name"):
            store.put(key, b"")
        with pytest.raises(StoreError, match="no valid object name"):
            store.put_new(key, b"")
        with pytest.raises(StoreError, match="no valid object name"):
            store.open_writer(key)
        with pytest.raises(StoreError, match="no valid object name"):
            store.delete(key)

    def test_a_streamed_object_is_invisible_until_its_writer_ends(self, store: Store) -> None:
        """The caller may reuse its memory between two writes."""
        buffer = bytearray(b"x" * (20 << 20))
        with store.open_writer("done") as out:
            out.write(memoryview(buffer))
            buffer[:] = b"y" * len(buffer)
            out.write(memoryview(b"yz"))
            assert not store.exists("done")
        assert store.num_bytes("done") == out.num_bytes == (20 << 20) + 2
        assert store.read("done") == b"x" * (20 << 20) + b"yz"

    def test_a_writer_that_fails_leaves_nothing(self, store: Store) -> None:
        """Neither a large nor a small object appears."""

        def fail(num_bytes: int) -> None:
            with store.open_writer("half") as out:
                out.write(bytes(num_bytes))
                raise ValueError("stopped")

        for num_bytes in (10, 20 << 20):
            with pytest.raises(ValueError, match="stopped"):
                fail(num_bytes)
        assert not store.exists("half")
        assert not list(store.list())

    def test_deferred_commits_are_visible_once_committed(self, store: Store) -> None:
        """A store without deferred commits shows them at once; both are right."""
        with store.defer_commits() as deferred:
            store.put("first", b"1")
            with store.open_writer("second") as out:
                out.write(b"2")
        store.commit(deferred)
        assert sorted(store.list()) == ["first", "second"]
        assert store.read("second") == b"2"
