"""Claims: a run says that it is using a store, a collection says that it is deleting there; neither
ignores the other.

Each writes its own claim first and looks for the other's then. Object stores answer a listing with
every write that ended before it, so at least one of two that meet sees the other: a collection then
deletes nothing, a run waits. Age is measured with the store's own clock, between two objects of it.
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

ClaimKind = Literal["run", "collect"]
RENEW_SECONDS = 60.0
STALE = timedelta(minutes=15)
"""A claim that was not renewed for so long belongs to a process that was killed."""

log = logging.getLogger("mmerge.store")


class Claim:
    """Held while a store is used; renewed every minute, deleted at the end."""

    def __init__(self, store: Store, kind: ClaimKind) -> None:
        self.store, self.kind = store, kind
        self.key = f"claims/{kind}-{secrets.token_hex(8)}.json"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="mmerge-claim", daemon=True)

    def __enter__(self) -> Claim:
        self._write()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        with suppress(
            StoreError
        ):  # the work is done or failed by itself; a claim that stays is stale in minutes
            self.store.delete(self.key)

    def _write(self) -> None:
        self.store.put(self.key, to_canonical_json({"kind": self.kind}))

    def _renew(self) -> None:
        while not self._done.wait(RENEW_SECONDS):
            with suppress(StoreError):
                self._write()

    def find_others(self, kind: ClaimKind) -> list[str]:
        """Return the keys of the live claims of a kind, without this one."""
        modified: dict[str, datetime] = {
            listed.key: listed.modified for listed in self.store.list_objects("claims")
        }
        now = max(modified.values(), default=None)
        return [
            key
            for key, when in sorted(modified.items())
            if key != self.key
            and key.startswith(f"claims/{kind}-")
            and now is not None
            and now - when < STALE
        ]

    def wait_for_none(
        self, kind: ClaimKind, *, seconds: float = 3600.0, pause: float = 2.0
    ) -> None:
        """Return when no live claim of a kind is left. Raises StoreError when that takes longer
        than `seconds`.
        """
        deadline = time.monotonic() + seconds
        told = False
        while others := self.find_others(kind):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"{self.store.uri}: {others[0]} is held by another process. Wait for it to end,"
                    " or delete that object"
                )
            if not told:
                log.info("%s: waiting for 'mmerge gc' to end (%s)", self.store.uri, others[0])
                told = True
            time.sleep(pause)
