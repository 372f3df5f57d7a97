"""Files that are written and settled later: no name before their bytes are on the disk, in their
order, and none of them left behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import mmerge.manifests.stores.local as folder
from mmerge.manifests.errors import StoreError
from mmerge.manifests.stores.deferred_commit import collect_pending, settle
from mmerge.manifests.stores.object_store import Store, open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


def files(store: Store) -> list[str]:
    return sorted(path.name for path in Path(store.uri).rglob("*") if path.is_file())


def test_what_is_written_has_no_name_until_it_is_settled_by_whom_ever(store: Store) -> None:
    with collect_pending(store) as found:
        with store.open_writer("objects/a.safetensors") as out:
            out.write(bytes(9 << 20))  # more than the buffers hold that are on their way at once
        store.put("objects/a.json", b"entry")
        assert not list(store.list())
    store.put("plain", b"now")
    assert list(store.list()) == ["plain"], "behind the context each one waits for the disk itself"
    other = open_store(store.uri)
    settle(other, found)
    assert sorted(store.list()) == ["objects/a.json", "objects/a.safetensors", "plain"]
    assert store.read("objects/a.json") == b"entry"
    assert store.num_bytes("objects/a.safetensors") == 9 << 20
    assert files(store) == ["a.json", "a.safetensors", "plain"]


def test_names_come_in_order_each_behind_its_own_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync = folder._sync

    def note(path: Path) -> None:
        events.append(
            f"{path.name.split('.')[1]} of {sorted(store.list())}" if path.is_file() else "folder"
        )
        sync(path)

    with collect_pending(store) as found:
        store.put("first", b"1")
        store.put("second", b"2")
    monkeypatch.setattr(folder, "_sync", note)
    settle(store, found)
    assert events == ["first of []", "folder", "second of ['first']", "folder"]


def test_what_must_be_new_does_not_wait(store: Store) -> None:
    with collect_pending(store) as found:
        store.put_new("builds/x/manifest.json", b"{}")
        assert store.exists("builds/x/manifest.json")
    assert not found


def test_after_an_error_nothing_is_left(store: Store) -> None:
    def work() -> None:
        with collect_pending(store):
            store.put("first", b"1")
            raise RuntimeError("in mid-task")

    with pytest.raises(RuntimeError, match="in mid-task"):
        work()
    assert files(store) == []
    store.put("later", b"2")
    assert store.exists("later")


def test_a_file_that_cannot_be_settled_is_an_error_that_names_it_and_those_behind_it_are_deleted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collect_pending(store) as found:
        for name in ("first", "second", "third"):
            store.put(name, b"x")
    sync = folder._sync

    def fail(path: Path) -> None:
        if ".second." in path.name:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(folder, "_sync", fail)
    with pytest.raises(StoreError, match=r"second.*No space left"):
        settle(store, found)
    assert files(store) == ["first"], (
        "what has its name stays; what could not be settled, and what followed, is gone"
    )


@pytest.mark.parametrize("partial", ["../../.x.partial", "/etc/.x.partial"])
def test_a_temporary_name_cannot_leave_the_folder(store: Store, partial: str) -> None:
    with pytest.raises(StoreError, match="no valid object name"):
        settle(store, [folder.Pending("first", partial)])


def test_a_store_that_is_no_folder_has_nothing_that_waits() -> None:
    store: Any = open_store("memory://pending")
    with collect_pending(store) as found:
        store.put("first", b"1")
        assert store.exists("first")
    assert not found
    settle(store, found)
