"""Serve a composite over HTTP in this process, with uvicorn."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from typing_extensions import override
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmerge.manifests import limits
from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.serving.door import KEY_VARIABLE, AsgiApp

GRACE_S = 30
"""Seconds that answers may take to end once the server is asked to end."""


class TimedProtocol(H11Protocol):
    """Closes a connection that sends no whole head of a request in time.

    Bodies have a limit of their own in `Door`; the library has none for heads.
    """

    _head_timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._set_timer()

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._set_timer()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_timer()
        super().connection_lost(exc)

    def _set_timer(self) -> None:
        """Let time run while a head is awaited; it began with the first of its bytes."""
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            self._clear_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(
                limits.REQUEST_SECONDS.value, self.transport.close
            )

    def _clear_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def check_address(host: str, keys: Sequence[str], *, is_open: bool) -> None:
    """Check that strangers need a key where others than this machine can reach the server.

    Raises:
        MmergeError: `host` is no loopback address, there are no keys, and it is not `is_open`.
    """
    is_loopback = host == "localhost"
    with suppress(ValueError):
        is_loopback = ipaddress.ip_address(host).is_loopback
    if not keys and not is_open and not is_loopback:
        raise MmergeError(
            f"--host: {host} can be reached from other machines, and no API key is set. Give"
            f" --api-key-file FILE or set {KEY_VARIABLE}; --no-api-key serves everyone"
        )


def run_server(
    app: AsgiApp,
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    certificate_key: Path | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; answers that have begun are ended first.

    Raises:
        MmergeError: the address is taken, or the certificate cannot be read.
    """
    try:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            http=TimedProtocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=GRACE_S,
            ssl_certfile=certificate,
            ssl_keyfile=certificate_key,
        )
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise MmergeError(f"--tls-certificate: {certificate}: cannot be read ({error})") from error
    try:
        # The library sends itself the signal again once the answers have ended.
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run()
    except SystemExit as error:  # what the library ends with where the port is taken
        raise MmergeError(
            f"--port: {host}:{port} cannot be listened on, see the log. Choose another"
        ) from error
