"""Local stores: deferred commits, and identities that change with the file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mmerge.manifests.errors import NotFound, StoreError, StoreUnavailable
from mmerge.manifests.stores import local_writer
from mmerge.manifests.stores.base import DeferredCommit, Store
from mmerge.manifests.stores.local import LocalStore
from mmerge.manifests.stores.open import open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), create=True)


def files(store: Store) -> list[str]:
    return sorted(path.name for path in Path(store.uri).rglob("*") if path.is_file())


def test_a_deferred_file_has_no_name_until_any_store_of_the_folder_commits_it(store: Store) -> None:
    with store.defer_commits() as deferred:
        with store.open_writer("objects/a.safetensors") as out:
            out.write(bytes(9 << 20))  # more than the buffers hold that are on their way at once
        store.put("objects/a.json", b"entry")
        assert not list(store.list())
    store.put("plain", b"now")
    assert list(store.list()) == ["plain"], "after the context each write waits for the disk"
    reopened = open_store(store.uri)
    reopened.commit(deferred)
    assert sorted(store.list()) == ["objects/a.json", "objects/a.safetensors", "plain"]
    assert store.read("objects/a.json") == b"entry"
    assert store.num_bytes("objects/a.safetensors") == 9 << 20
    assert files(store) == ["a.json", "a.safetensors", "plain"]


def test_files_get_their_names_in_order_each_after_its_own_bytes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    sync = local_writer._sync

    def note(path: Path) -> None:
        events.append(
            f"{path.name.split('.')[1]} of {sorted(store.list())}" if path.is_file() else "folder"
        )
        sync(path)

    with store.defer_commits() as deferred:
        store.put("first", b"1")
        store.put("second", b"2")
    monkeypatch.setattr(local_writer, "_sync", note)
    store.commit(deferred)
    assert events == ["first of []", "folder", "second of ['first']", "folder"]


def test_a_create_is_not_deferred(store: Store) -> None:
    with store.defer_commits() as deferred:
        store.put_new("builds/x/manifest.json", b"{}")
        assert store.exists("builds/x/manifest.json")
    assert not deferred


def test_after_an_error_deferred_files_are_deleted(store: Store) -> None:
    def work() -> None:
        with store.defer_commits():
            store.put("first", b"1")
            raise RuntimeError("in mid-task")

    with pytest.raises(RuntimeError, match="in mid-task"):
        work()
    assert files(store) == []
    store.put("later", b"2")
    assert store.exists("later")


def test_a_failing_commit_names_its_file_and_deletes_the_remaining_ones(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store.defer_commits() as deferred:
        for name in ("first", "second", "third"):
            store.put(name, b"x")
    sync = local_writer._sync

    def fail(path: Path) -> None:
        if ".second." in path.name:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(local_writer, "_sync", fail)
    with pytest.raises(StoreError, match=r"second.*No space left"):
        store.commit(deferred)
    assert files(store) == ["first"], "a committed file was deleted, or an uncommitted one was left"


@pytest.mark.parametrize("partial", ["../../.x.partial", "/etc/.x.partial"])
def test_a_temporary_name_cannot_leave_the_folder(store: Store, partial: str) -> None:
    with pytest.raises(StoreError, match="no valid object name"):
        store.commit([DeferredCommit("first", partial)])


def test_a_store_without_deferred_commits_shows_what_is_put_at_once() -> None:
    store = open_store("memory://pending")
    with store.defer_commits() as deferred:
        store.put("first", b"1")
        assert store.exists("first")
    assert not deferred
    store.commit(deferred)
    with pytest.raises(StoreError, match="first: this store defers no commits"):
        store.commit([DeferredCommit("first", ".first.partial")])


def test_the_identity_of_a_file_changes_where_size_time_and_inode_stay(store: Store) -> None:
    """`cp -p` over a file keeps all three; nobody can set the time of the status change."""
    store.put("file", b"first")
    path = Path(store.uri) / "file"
    os.utime(path, (1e9, 1e9))
    before, identity = path.stat(), store.identity("file")
    assert store.identity("file") == identity
    time.sleep(0.02)  # beyond the resolution of the file system's clock
    path.write_bytes(b"other")
    os.utime(path, (1e9, 1e9))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )
    assert store.identity("file") != identity


def test_a_folder_is_no_object(store: Store) -> None:
    store.put("folder/file", b"1")
    for verb in (store.read, store.num_bytes, store.identity):
        with pytest.raises(NotFound, match="folder: not found, it is a folder"):
            verb("folder")
    assert not store.exists("folder")
    with pytest.raises(StoreError, match="folder: Is a directory"):
        store.delete("folder")
    assert store.exists("folder/file")


@pytest.mark.parametrize("is_deferred", [False, True])
def test_an_unfinished_file_that_was_deleted_is_named_and_may_be_written_again(
    tmp_path: Path, is_deferred: bool
) -> None:
    """As garbage collection does it to a process that was suspended."""
    store = LocalStore(tmp_path)

    def write_and_lose() -> None:
        if not is_deferred:
            with store.open_writer("objects/x") as out:
                out.write(b"1")
                next(tmp_path.rglob("*.partial")).unlink()
            return
        with store.defer_commits() as deferred:
            store.put("objects/x", b"1")
        next(tmp_path.rglob("*.partial")).unlink()
        store.commit(deferred)

    with pytest.raises(StoreUnavailable, match=r"objects/x: its unfinished file .* Run again"):
        write_and_lose()
    store.put("objects/x", b"1")


@pytest.mark.parametrize("has_links", [True, False])
def test_a_create_whose_file_was_deleted_leaves_no_empty_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    store = LocalStore(tmp_path)
    link = local_writer.os.link

    def delete_then_link(partial: Path, target: Path) -> None:
        partial.unlink()
        if not has_links:
            raise PermissionError("no links")
        link(partial, target)

    monkeypatch.setattr(local_writer.os, "link", delete_then_link)
    with pytest.raises(NotFound, match="builds/x"):
        store.put_new("builds/x", b"1")
    assert not list(store.list())
