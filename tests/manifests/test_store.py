from __future__ import annotations

from pathlib import Path

import pytest

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError
from mmerge.manifests.store import Store, open_store


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path / "store"), create=True)


def test_what_was_put_is_read_whole_and_in_ranges(store: Store) -> None:
    store.put("a/b.bin", bytes(range(100)))
    assert store.read("a/b.bin") == bytes(range(100))
    assert bytes(store.read_range("a/b.bin", offset=10, num_bytes=5)) == bytes(range(10, 15))
    assert store.num_bytes("a/b.bin") == 100
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")


def test_put_new_refuses_to_replace_and_leaves_the_first(store: Store) -> None:
    store.put_new("a", b"first")
    with pytest.raises(AlreadyExists, match="a: already exists"):
        store.put_new("a", b"second")
    assert store.read("a") == b"first"


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
