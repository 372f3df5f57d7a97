"""Object storage servers for tests and benchmarks, and a proxy that injects faults.

Each server has its own ports and folder, and is ended by its process id.
"""

from __future__ import annotations

import http.client
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from ceph_server import ceph_server, has_ceph
from server_process import end, free_port, make_bucket, s3_environment, wait_for
from swift_server import find_swift, keeps_attributes, swift_server

REPOSITORY = Path(__file__).resolve().parent.parent
Fault = Literal["500", "503", "reset", "truncated", "stall"]
FAULTS: tuple[Fault, ...] = ("500", "503", "reset", "truncated", "stall")
AZURITE_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The published key of the emulator's only account."""


@contextmanager
def moto_server(folder: Path) -> Iterator[dict[str, str]]:
    """An S3 server in memory; its create is atomic, it checks no signature."""
    port = free_port()
    with (folder / "moto.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(port, process=process)
        environment = s3_environment(f"http://127.0.0.1:{port}")
        make_bucket(environment, "bucket")
        yield environment
    finally:
        end(process)


def find_azurite() -> str | None:
    """The Azure emulator: on PATH, or where `make azurite` puts it."""
    local = REPOSITORY / ".venv" / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    return (
        os.environ.get("AZURITE_BLOB")
        or shutil.which("azurite-blob")
        or (str(local) if local.exists() else None)
    )


@contextmanager
def azurite_server(folder: Path) -> Iterator[dict[str, str]]:
    port = free_port()
    program = find_azurite()
    assert program is not None
    command = [
        program,
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        str(port),
        "--location",
        str(folder),
        "--silent",
        "--disableTelemetry",
    ]
    with (folder / "azurite.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--skipApiVersionCheck"], stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(port, process=process)
        environment = {
            "AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1",
            "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}/devstoreaccount1",
        }
        _make_container(port)
        yield environment
    finally:
        end(process)


def _make_container(port: int) -> None:
    """Create a container, signed with the account's shared key (the library has no verb for it)."""
    import base64
    import hashlib
    import hmac
    from email.utils import formatdate

    date = formatdate(usegmt=True)
    headers = {"x-ms-date": date, "x-ms-version": "2023-11-03", "Content-Length": "0"}
    account = "devstoreaccount1"
    signed = "\n".join(
        [
            "PUT" + "\n" * 11,
            f"x-ms-date:{date}",
            "x-ms-version:2023-11-03",
            f"/{account}/{account}/bucket",
            "restype:container",
        ]
    )
    signature = base64.b64encode(
        hmac.new(base64.b64decode(AZURITE_KEY), signed.encode(), hashlib.sha256).digest()
    ).decode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(
        "PUT",
        f"/{account}/bucket?restype=container",
        headers=headers | {"Authorization": f"SharedKey {account}:{signature}"},
    )
    answer = connection.getresponse()
    if answer.status != 201:
        raise RuntimeError(f"container: {answer.status} {answer.read()[:300]!r}")
    connection.close()


class FaultProxy:
    """An HTTP proxy before an S3 server that breaks a share of the requests.

    `racy_create` makes the server's create look first and write later, as some real servers do.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        share: float = 0.0,
        faults: tuple[Fault, ...] = FAULTS,
        stall_seconds: float = 10.0,
        seed: int = 0,
        racy_create: bool = False,
    ) -> None:
        self.upstream = endpoint.removeprefix("http://")
        self.share, self.faults, self.stall_seconds, self.racy_create = (
            share,
            faults,
            stall_seconds,
            racy_create,
        )
        self.counts: dict[str, int] = {}
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = lambda self: proxy.handle(self)  # noqa: N815

            def log_message(self, *args: Any) -> None:
                return

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                return

        self.server = Server(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _choose(self) -> str:
        with self._lock:
            fault = (
                self._random.choice(self.faults) if self._random.random() < self.share else "none"
            )
            self.counts[fault] = self.counts.get(fault, 0) + 1
        return fault

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self._choose()
        if fault == "stall":
            time.sleep(self.stall_seconds)
        if fault == "reset":
            request.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            request.connection.close()
            return
        if fault in ("500", "503"):
            self._answer(request, int(fault), {}, b"<Error><Code>InternalError</Code></Error>")
            return
        status, headers, data = self._forward(request, body)
        if fault == "truncated" and data and request.command == "GET":
            self._answer(request, status, headers, data[: len(data) // 2], promised=len(data))
            request.close_connection = True
            return
        self._answer(request, status, headers, data)

    def _forward(
        self, request: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        headers = {
            name: value for name, value in request.headers.items() if name.lower() != "connection"
        }
        conditions = [name for name in headers if name.lower() == "if-none-match"]
        if self.racy_create and request.command == "PUT" and conditions:
            del headers[conditions[0]]
            asking = {
                name: value for name, value in headers.items() if name.lower() != "content-length"
            }
            status, _, _ = self._send("HEAD", request.path, asking, b"")
            if status == 200:
                return (
                    412,
                    {"Content-Type": "application/xml"},
                    b"<Error><Code>PreconditionFailed</Code></Error>",
                )
            time.sleep(0.1)
        return self._send(request.command, request.path, headers, body)

    def _send(
        self, command: str, path: str, headers: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            connection.request(command, path, body=body or None, headers=headers)
            answer = connection.getresponse()
            data = answer.read()
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "date", "server")
            }
            if command != "HEAD":
                kept.pop("Content-Length", None)
            return answer.status, kept, data
        finally:
            connection.close()

    def _answer(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        data: bytes,
        *,
        promised: int | None = None,
    ) -> None:
        request.send_response(status)
        if request.command != "HEAD" and status != 204:
            headers = {
                name: value for name, value in headers.items() if name.lower() != "content-length"
            }
            headers["Content-Length"] = str(len(data) if promised is None else promised)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(data)


Server = Callable[[Path], Any]
SERVERS: dict[str, tuple[Server, Callable[[], bool], str]] = {
    "moto": (moto_server, lambda: True, ""),
    "ceph": (ceph_server, has_ceph, "radosgw is not installed ('make test-ceph' says how)"),
    "swift": (
        swift_server,
        lambda: find_swift() is not None and keeps_attributes(),
        "swift is not installed ('make swift'), or its disk keeps no attributes",
    ),
    "azurite": (
        azurite_server,
        lambda: find_azurite() is not None,
        "azurite is not installed ('make azurite')",
    ),
}
SCHEME = {"moto": "s3", "ceph": "s3", "swift": "s3", "azurite": "az"}
