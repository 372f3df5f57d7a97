"""What a request must pass before the application sees it: key, size, and time to arrive."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mmerge.manifests import limits
from mmerge.manifests.errors import MmergeError
from mmerge.manifests.regular_file import open_regular_file
from mmerge.pipeline.serving.api_errors import ApiError

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

KEY_VARIABLE = "MMERGE_API_KEY"
_MIN_KEY_CHARACTERS = 16
_MAX_KEY_FILE_BYTES = 1 << 20


def read_keys(path: Path | None) -> tuple[str, ...]:
    """Return the API keys of a file, one per line, or of MMERGE_API_KEY; none if there is neither.

    Raises:
        MmergeError: the file cannot be read, has no key, or one that is easy to guess.
    """
    if path is None:
        where, text = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "")
        if not text:
            return ()
    else:
        where = f"--api-key-file: {path}"
        try:
            with open_regular_file(path) as file:
                text = file.read(_MAX_KEY_FILE_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise MmergeError(f"{where}: cannot be read ({error})") from error
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not keys or any(len(key) < _MIN_KEY_CHARACTERS or not key.isascii() for key in keys):
        raise MmergeError(
            f"{where}: expected keys of at least {_MIN_KEY_CHARACTERS} ASCII characters, one per"
            " line. 'openssl rand -hex 32' makes one"
        )
    return keys


class Door:
    """An ASGI application that lets whole, permitted requests through to another one.

    A body is read completely before the application is called, within bounds on its size and time:
    a client that sends slowly costs a connection, and no one else waits.
    """

    def __init__(self, app: AsgiApp, *, keys: Sequence[str], open_paths: Sequence[str]) -> None:
        """Guard `app`; without `keys` everyone may ask, and `open_paths` need none ever."""
        self._app = app
        self._keys = [key.encode() for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = {name.lower(): value for name, value in scope["headers"]}
            if scope["path"] not in self._open_paths:
                self._check_key(headers.get(b"authorization", b""))
            body = await _read_body(headers, receive)
        except ApiError as error:
            await _send_error(error, send)
            return
        except ConnectionResetError:
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, authorization: bytes) -> None:
        if not self._keys:
            return
        scheme, _, key = authorization.partition(b" ")
        # All keys are compared, each in constant time: the time tells nothing about any of them.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise ApiError(
                401,
                "give an API key of this server: 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )


async def _read_body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: 413; it is too large. 408; it does not arrive in time.
        ConnectionResetError: the client left.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit():
        _check_size(int(announced))
    until = time.monotonic() + limits.REQUEST_SECONDS.value
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        try:
            message = await asyncio.wait_for(receive(), timeout=max(0.0, until - time.monotonic()))
        except (asyncio.TimeoutError, TimeoutError):
            raise ApiError(
                408, f"the request did not arrive within {limits.REQUEST_SECONDS.value} seconds"
            ) from None
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        chunk = message.get("body", b"")
        num_bytes += len(chunk)
        _check_size(num_bytes)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _check_size(num_bytes: int) -> None:
    limit = limits.REQUEST_BYTES.value
    if num_bytes > limit:
        raise ApiError(413, f"the body has more than {limit:,} bytes, which are the most read")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read, then what the connection says next."""
    waiting = [body]

    async def receive_again() -> MutableMapping[str, Any]:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return receive_again


async def _send_error(error: ApiError, send: Send) -> None:
    body = json.dumps(error.to_body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        # The rest of the body may still be under way: it is not read.
        "connection": "close",
    } | error.headers
    await send(
        {
            "type": "http.response.start",
            "status": error.status,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
