"""Google Cloud Storage by URI, as far as it can be tried without the real one: what is asked of it,
and with which credentials.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError
from mmerge.manifests.stores.open import open_store

ACCOUNT = "merger@project.iam.gserviceaccount.com"


class Bucket:
    """The requests of the XML API that a store needs; records the tokens sent with them."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.tokens: list[str] = []
        bucket = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_HEAD = do_PUT = do_DELETE = lambda self: bucket.handle(self)  # noqa: N815

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.tokens.append(request.headers.get("Authorization", ""))
        key = unquote(urlsplit(request.path).path)
        status, data = 200, b""
        if request.command == "PUT":
            if request.headers.get("x-goog-if-generation-match") == "0" and key in self.objects:
                status = 412
            else:
                self.objects[key] = body
        elif key not in self.objects:
            status = 404
        else:
            data = self.objects[key]
        request.send_response(status)
        for name, value in {
            "ETag": '"1"',
            "Last-Modified": "Wed, 25 Nov 2026 06:00:00 GMT",
            "Content-Length": str(len(data)),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


@pytest.fixture
def bucket() -> Iterator[Bucket]:
    server_bucket = Bucket()
    yield server_bucket
    server_bucket.server.shutdown()
    server_bucket.server.server_close()


def test_a_bucket_is_reached_with_the_service_account_that_the_environment_names(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    account = {
        "type": "service_account",
        "project_id": "project",
        "private_key_id": "7",
        "private_key": pem,
        "client_email": ACCOUNT,
        "client_id": "1",
        "token_uri": "http://127.0.0.1:9/token",
        "gcs_base_url": bucket.endpoint,
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    # Only from this variable does the library take the address of another server, which the file
    # names.
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.endpoint)
    store = open_store("gs://models/composites")
    store.put("a", b"12345")
    assert store.read("a") == b"12345"
    assert bucket.objects == {"/models/composites/a": b"12345"}
    store.put_new("b", b"first")
    with pytest.raises(AlreadyExists):
        store.put_new("b", b"second")
    with pytest.raises(NotFound):
        store.read("c")
    assert bucket.tokens
    for token in bucket.tokens:
        assert token.startswith("Bearer ")
        signed, _, signature = token.removeprefix("Bearer ").rpartition(".")
        key.public_key().verify(
            decode(signature), signed.encode(), padding.PKCS1v15(), hashes.SHA256()
        )
        assert json.loads(decode(signed.split(".")[1]))["iss"] == ACCOUNT
    assert "PRIVATE KEY" not in repr(store.uri)


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def test_credentials_that_are_not_there_or_no_credentials_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    with pytest.raises(
        StoreError,
        match=(
            r"gs://models/x: cannot be opened \(.*nowhere\.json.*Set the credentials in the"
            r" environment"
        ),
    ):
        open_store("gs://models/x")
    (tmp_path / "empty.json").write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "empty.json"))
    with pytest.raises(StoreError, match=r"gs://models/x: cannot be opened"):
        open_store("gs://models/x")


def test_an_environment_without_credentials_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last resort is the metadata server of a cloud's machine, which is not there (or has
    nothing for us).
    """
    for name in (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MMERGE_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MMERGE_RETRY_TIMEOUT", "1")
    with pytest.raises(
        StoreError,
        match=(
            r"gs://models/x: a: the environment holds no credentials\. Set"
            r" GOOGLE_APPLICATION_CREDENTIALS"
        ),
    ):
        open_store("gs://models/x").read("a")
