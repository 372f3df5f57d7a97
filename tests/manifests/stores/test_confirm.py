"""Servers that lose answers, keep nothing, keep half or other bytes, or refuse a create for now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from store_servers import FaultProxy

from mmerge.manifests.errors import AlreadyExists, StoreError, StoreUnavailable
from mmerge.manifests.stores import confirm, object_store
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.create_check import check_store
from mmerge.manifests.stores.error_translation import translate_errors
from mmerge.manifests.stores.open import open_store
from mmerge.manifests.stores.upload_check import UPLOAD_PART_BYTES, UploadDigests

DATA = bytes(range(256)) * 40
LARGE = DATA * 1000
"""Two parts."""
CONFLICT = b"<Error><Code>ConditionalRequestConflict</Code></Error>"
Answer = tuple[int, dict[str, str], bytes]


class LyingProxy(FaultProxy):
    """A proxy that treats the next `count` uploads as `lie` says."""

    lie = ""
    count = 0
    num_lies = 0

    def tell(self, lie: str, *, count: int) -> None:
        self.lie, self.count = lie, count

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> Answer:
        if request.command != "PUT" or self.count == 0:
            return super()._forward(request, body)
        self.count -= 1
        self.num_lies += 1
        if self.lie == "conflict":
            return 409, {}, CONFLICT
        if self.lie == "be busy":
            return 503, {}, b"<Error><Code>SlowDown</Code></Error>"
        if self.lie == "keep nothing":
            return 200, {"ETag": '"0"'}, b""
        if self.lie == "flip a bit":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if self.lie == "keep half":
            body = body[: len(body) // 2]
            request.headers.replace_header("Content-Length", str(len(body)))
        answer = super()._forward(request, body)
        if self.lie == "lose the answer":
            return 500, {}, b"<Error><Code>InternalError</Code></Error>"
        if self.lie == "say that it exists":
            return 412, {}, b"<Error><Code>PreconditionFailed</Code></Error>"
        return answer


@pytest.fixture
def proxy(places: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[LyingProxy]:
    monkeypatch.setattr(confirm, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(object_store.random, "uniform", lambda low, high: 0.01)
    places.make("moto")
    with LyingProxy(places.endpoint("moto")) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


@pytest.fixture
def remote(proxy: LyingProxy, request: pytest.FixtureRequest) -> Store:
    return open_store(f"s3://bucket/{abs(hash(request.node.name))}")


def stream(store: Store, key: str, data: bytes) -> None:
    with store.open_writer(key) as out:
        for start in range(0, len(data), 3_000_001):
            out.write(data[start : start + 3_000_001])


WRITERS: dict[str, Callable[[Store, str, bytes], object]] = {
    "put": lambda store, key, data: store.put(key, data),
    "stream": stream,
}
BROKEN = ["keep nothing", "flip a bit", "keep half"]


@pytest.mark.parametrize("data", [DATA, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("lie", BROKEN)
def test_an_upload_that_the_server_did_not_keep_as_it_was_sent_is_an_error(
    remote: Store, proxy: LyingProxy, writer: str, data: bytes, lie: str
) -> None:
    proxy.tell(lie, count=1000)
    with pytest.raises(StoreError, match="objects/x"):
        WRITERS[writer](remote, "objects/x", data)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_upload_that_the_server_is_too_busy_for_may_be_tried_again(
    remote: Store, proxy: LyingProxy, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMERGE_RETRY_TIMEOUT", "0.5")
    store = open_store(remote.uri)
    proxy.tell("be busy", count=1000)
    with pytest.raises(StoreUnavailable, match="objects/x"):
        WRITERS[writer](store, "objects/x", DATA)


@pytest.mark.parametrize("lie", BROKEN)
def test_a_put_that_failed_once_is_repeated(remote: Store, proxy: LyingProxy, lie: str) -> None:
    proxy.tell(lie, count=1)
    remote.put("objects/x", DATA)
    assert remote.read("objects/x") == DATA
    assert proxy.num_lies == 1


@pytest.mark.parametrize("lie", [*BROKEN, "lose the answer", "say that it exists", "conflict"])
def test_a_create_ends_with_its_own_bytes_whatever_the_server_says_first(
    remote: Store, proxy: LyingProxy, lie: str
) -> None:
    proxy.tell(lie, count=1)
    assert confirm.create(remote, "refs/x", DATA).data == DATA
    assert remote.read("refs/x") == DATA
    assert proxy.num_lies == 1


@pytest.mark.parametrize("lie", [*BROKEN, "conflict"])
def test_a_create_that_never_succeeds_ends_in_an_error(
    remote: Store, proxy: LyingProxy, lie: str
) -> None:
    proxy.tell(lie, count=1000)
    with pytest.raises(StoreUnavailable, match="refs/x"):
        confirm.create(remote, "refs/x", DATA)
    assert not remote.exists("refs/x")


@pytest.mark.parametrize("lie", ["lose the answer", "say that it exists", "conflict"])
def test_the_check_of_a_store_survives_a_lost_answer(
    remote: Store, proxy: LyingProxy, lie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(remote), "backend", f"s3 of {lie}")
    put = remote.put

    def put_then_lie(key: str, data: bytes) -> None:
        put(key, data)
        proxy.tell(lie, count=1)

    monkeypatch.setattr(remote, "put", put_then_lie)
    assert check_store(remote)
    assert proxy.num_lies


def test_another_writers_object_stays(remote: Store) -> None:
    remote.put_new("refs/x", b"first")
    stored = confirm.create(remote, "refs/x", b"second")
    assert (stored.data, stored.is_new) == (b"first", False)


def test_the_check_before_a_create_is_made_before_each_request(remote: Store) -> None:
    calls: list[int] = []

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise TimeoutError

    put_new = remote.put_new
    remote.put_new = lambda key, data: None  # type: ignore[method-assign]
    with pytest.raises(TimeoutError):
        confirm.create(remote, "refs/x", b"1", check=check)
    remote.put_new = put_new  # type: ignore[method-assign]


@pytest.mark.parametrize("data", [b"", DATA, LARGE, bytes(UPLOAD_PART_BYTES)])
def test_the_digests_of_an_upload_are_the_entity_tag_of_the_server(
    remote: Store, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read back then."""
    monkeypatch.setattr(remote, "read", None)
    monkeypatch.setattr(remote, "read_range", None)
    for write in WRITERS.values():
        write(remote, "objects/x", data)


@pytest.mark.parametrize("tag", ["d41d8cd98f00b204e9800998ecf8427e", "0x8DC1234"])
def test_other_entity_tags_are_no_error_and_other_bytes_are(
    remote: Store, tag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of encrypted buckets, Google and Azure."""
    import obstore

    head = obstore.head
    monkeypatch.setattr(obstore, "head", lambda client, key: head(client, key) | {"e_tag": tag})
    for data in (DATA, LARGE):
        stream(remote, "objects/x", data)
        digests = UploadDigests()
        digests.update(data[:-1] + b"?")
        if len(data) < UPLOAD_PART_BYTES:
            with pytest.raises(StoreUnavailable, match="other bytes"):
                remote.confirm_upload("objects/x", digests)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("uri", "body", "error"),
    [
        ("s3://b", "<Code>ConditionalRequestConflict</Code>", StoreUnavailable),
        ("s3://b", "", StoreUnavailable),
        ("gs://b", "<Code>Conflict</Code>", StoreUnavailable),
        ("az://b", "<Code>BlobAlreadyExists</Code>", AlreadyExists),
        ("az://b", "", AlreadyExists),
        ("az://b", "<Code>LeaseAlreadyPresent</Code>", StoreUnavailable),
    ],
)
def test_status_409_is_a_lost_race_or_an_existing_object(
    uri: str, body: str, error: type[StoreError]
) -> None:
    from obstore.exceptions import AlreadyExistsError

    with pytest.raises(error), translate_errors(uri, "k"):
        raise AlreadyExistsError(f"non-2xx status code: 409 Conflict: <Error>{body}</Error>")
