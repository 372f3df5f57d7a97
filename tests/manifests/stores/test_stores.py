"""One contract for every store: the conformance suite, and what is particular to each kind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from numpy.typing import NDArray

from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.stores.base import ReadableStore, Store
from mmerge.manifests.stores.create_check import check_store, verdict_key
from mmerge.manifests.stores.open import open_readable_store, open_store
from mmerge.manifests.stores.prefetch import read_in_parts
from mmerge.manifests.testing import ReadableStoreConformance, StoreConformance

STORES = ["memory", "local", "moto", "ceph", "swift", "azurite"]


class TestEveryStore(StoreConformance):
    @pytest.fixture(params=STORES)
    def store(self, request: pytest.FixtureRequest, places: Any) -> Store:
        return open_store(places.make(request.param), create=True)

    @pytest.fixture
    def has_atomic_create(self, request: pytest.FixtureRequest) -> bool:
        kind: str = request.node.callspec.params["store"]
        return kind != "swift"  # it looks first and writes later


class TestHubStore(ReadableStoreConformance):
    @pytest.fixture
    def fill(self, hub: HubServer) -> Any:
        def commit(objects: dict[str, bytes]) -> ReadableStore:
            return open_readable_store(f"hf://org/x@{hub.commit('org/x', objects)}")

        return commit


@pytest.fixture
def remote_store(places: Any) -> Store:
    return open_store(places.make("moto"))


def count_creates(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that will hold the key of every `put_new` of this store."""
    keys: list[str] = []
    put_new = store.put_new

    def note(key: str, data: bytes) -> None:
        keys.append(key)
        put_new(key, data)

    monkeypatch.setattr(store, "put_new", note)
    return keys


def test_a_remote_store_is_tried_once_per_server(
    remote_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    creates = count_creates(remote_store, monkeypatch)
    assert check_store(remote_store)
    assert len(creates) == 72, "8 rounds of 8 writers, and one late writer each"
    assert check_store(remote_store)
    assert len(creates) == 72, "the verdict was not remembered"
    monkeypatch.setattr(type(remote_store), "backend", "s3 http://another.server")
    assert check_store(remote_store)
    assert len(creates) == 144, "the verdict on one server was taken for another's"


@pytest.mark.parametrize("verdict", [b"", b"{", b"[]", b'{"atomic_create": 1}'])
def test_a_damaged_verdict_is_replaced(remote_store: Store, verdict: bytes) -> None:
    remote_store.put(verdict_key(remote_store), verdict)
    assert check_store(remote_store)
    assert remote_store.read(verdict_key(remote_store)) == b'{"atomic_create":true}'


def test_a_verdict_against_a_store_is_remembered_and_logged_again(
    remote_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remote_store.put(verdict_key(remote_store), b'{"atomic_create":false}')
    creates = count_creates(remote_store, monkeypatch)
    assert not check_store(remote_store)
    assert not creates
    assert "lets several writers create one object" in caplog.text


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


def test_a_missing_folder_a_file_and_an_unwritable_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        open_store(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        open_store(str(tmp_path / "file"), create=True)
    with pytest.raises(StoreError, match="cannot be made"):
        open_store(str(tmp_path / "file" / "below"), create=True)


@pytest.mark.parametrize("uri", ["hf://org/x", "hf://org/x@main"])
def test_a_repository_of_the_hub_is_not_opened_to_write(hub: HubServer, uri: str) -> None:
    hub.commit("org/x", {"a": b"1"})
    with pytest.raises(StoreError, match=r"can only be read.*mmerge push"):
        open_store(uri)
    assert open_readable_store(uri).read("a") == b"1"


def test_stores_of_one_memory_uri_share_their_objects_while_one_is_alive() -> None:
    store = open_store("memory://shared")
    store.put("a", b"1")
    assert open_store("memory://shared").read("a") == b"1"
    del store
    assert not open_store("memory://shared").exists("a")


def test_an_unknown_scheme_lists_those_that_there_are() -> None:
    with pytest.raises(StoreError, match=r"unknown scheme 'ftp'.*file://, gs://, hf://, memory://"):
        open_store("ftp://host/x")
