"""Leases that keep runs and garbage collection from operating on a store concurrently.

Each process first writes its own lease, then looks for leases of the other kind. An object store
answers a listing with every write that ended before it, so of two concurrent processes at least one
sees the other: a garbage collection then deletes nothing, a run waits. The age of a lease is the
difference between two of the store's own times, so that clocks need not agree.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta
from types import TracebackType
from typing import Literal

from mmerge.manifests.digest import to_canonical_json
from mmerge.manifests.errors import StoreError
from mmerge.manifests.stores.base import Store

LeaseKind = Literal["run", "collect"]
"""`collect` is garbage collection, as stored keys name it."""
FOLDER = "claims"
"""The stored keys keep the name that leases had in the first version of the format."""
RENEW_SECONDS = 60.0
STALE = timedelta(minutes=15)
"""A lease that was not renewed for so long belongs to a process that was killed."""

log = logging.getLogger("mmerge.store")


class Lease:
    """A context in which a process uses a store; renewed every minute, deleted at the end."""

    def __init__(self, store: Store, kind: LeaseKind) -> None:
        self.store, self.kind = store, kind
        self.key = f"{FOLDER}/{kind}-{secrets.token_hex(8)}.json"
        self._is_released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="mmerge-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_released.set()
        self._thread.join()
        # The work has succeeded or failed by itself; a lease that stays is stale in minutes.
        with suppress(StoreError):
            self.store.delete(self.key)

    def _write(self) -> None:
        self.store.put(self.key, to_canonical_json({"kind": self.kind}))

    def _renew(self) -> None:
        while not self._is_released.wait(RENEW_SECONDS):
            with suppress(StoreError):  # the next renewal comes long before the lease is stale
                self._write()

    def find_others(self, kind: LeaseKind) -> list[str]:
        """Return the keys of the live leases of a kind, without this one."""
        modified: dict[str, datetime] = {
            listed.key: listed.modified for listed in self.store.list_objects(FOLDER)
        }
        if not modified:
            return []
        now = max(modified.values())
        prefix = f"{FOLDER}/{kind}-"
        return [
            key
            for key, time_of_renewal in sorted(modified.items())
            if key != self.key and key.startswith(prefix) and now - time_of_renewal < STALE
        ]

    def wait_for_none(
        self, kind: LeaseKind, *, seconds: float = 3600.0, pause: float = 2.0
    ) -> None:
        """Return when no live lease of a kind is left; look every `pause` seconds.

        Raises:
            StoreError: that takes longer than `seconds`.
        """
        deadline = time.monotonic() + seconds
        is_logged = False
        while lease_keys := self.find_others(kind):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self.store.uri}: {lease_keys[0]} is held by another process. Wait for it to"
                    " end, or delete that object"
                )
            if not is_logged:
                log.info("%s: waiting for 'mmerge gc' to end (%s)", self.store.uri, lease_keys[0])
                is_logged = True
            time.sleep(pause)
