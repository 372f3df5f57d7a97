"""Leases that keep runs and garbage collection from operating on a store concurrently.

Each process first writes its own lease, then looks for leases of the other kind. A store answers a
listing with every write that ended before it, so of two concurrent processes at least one sees the
other: a garbage collection then deletes nothing, a run waits. The age of a lease is the difference
between two of the store's own times, so that clocks need not agree.

A process can be suspended for longer than its lease lives. What it does then is safe, too:
docs/storage.md has the protocol and its argument, fenced_commit.py and garbage_collection.py the
two sides of it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from types import TracebackType
from typing import Literal

from mmerge.manifests.digest import parse_json, to_canonical_json
from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.stores.base import Store

LeaseKind = Literal["run", "collect"]
"""`collect` is garbage collection, as stored keys name it."""
FOLDER = "claims"
"""The stored keys keep the name that leases had in the first version of the format."""
RENEW_SECONDS = 60.0
STALE = timedelta(minutes=15)
"""A lease that was not renewed for so long belongs to a process that was killed or suspended."""
ANNOUNCEMENT_LIFE = timedelta(days=1)
"""For so long the keys that a run has announced to commit are live, whatever became of the run."""
LAPSE_SECONDS = 300.0
"""A process that did not renew its lease for so long must not rely on it. The difference to STALE
is the time that a request which was sent before that may take to reach the store.
"""
MAX_ANNOUNCEMENT_BYTES = 64 << 20
_LISTING_ATTEMPTS = 3

log = logging.getLogger("mmerge.store")


def elapsed_seconds() -> float:
    """Return seconds by a clock that goes on while the machine is suspended, if there is one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


@dataclass(frozen=True)
class Timing:
    """Clock, pauses and names of a lease; replaced in tests and simulations."""

    now: Callable[[], float] = elapsed_seconds
    """Returns seconds, of this process alone."""
    sleep: Callable[[float], object] = time.sleep
    make_id: Callable[[], str] = lambda: secrets.token_hex(8)
    is_renewed_by_thread: bool = True
    """False: whoever holds the lease calls `Lease.renew`."""


@dataclass(frozen=True)
class Claims:
    """The objects of one listing of `claims/`, and the store's own time at that moment."""

    modified: Mapping[str, datetime]
    now: datetime

    def find_live(self, kind: str, *, life: timedelta = STALE) -> list[str]:
        """Return the keys of a kind whose age is below `life`; a time in the future is young."""
        return [key for key in self._of_kind(kind) if self.now - self.modified[key] < life]

    def find_stale(self, kind: str, *, life: timedelta = STALE) -> list[str]:
        """Return the keys of a kind whose age is `life` or more."""
        return [key for key in self._of_kind(kind) if self.now - self.modified[key] >= life]

    def _of_kind(self, kind: str) -> list[str]:
        return sorted(key for key in self.modified if key.startswith(f"{FOLDER}/{kind}-"))


class Lease:
    """A context in which a process uses a store; renewed every minute, deleted at the end."""

    def __init__(self, store: Store, kind: LeaseKind, *, timing: Timing | None = None) -> None:
        self.store, self.kind = store, kind
        self.timing = timing or Timing()
        identity = self.timing.make_id()
        self.key = f"{FOLDER}/{kind}-{identity}.json"
        self.fence_key = fence_key(self.key)
        self._announcement_key = f"{FOLDER}/commit-{identity}.json"
        self._renewed_at = self.timing.now()
        """When the last successful renewal began, by the clock of this process."""
        self._modified: datetime | None = None
        """The store's time of the last renewal that a listing has shown."""
        self._has_lapsed = False
        self._is_announced = False
        self._is_released = threading.Event()
        self._thread = threading.Thread(target=self._renew_often, name="mmerge-lease", daemon=True)

    def __enter__(self) -> Lease:
        self._renewed_at = self.timing.now()
        self.renew()
        if self.timing.is_renewed_by_thread:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_released.set()
        if self._thread.ident is not None:
            self._thread.join()
        # The work has succeeded or failed by itself; a lease that stays is stale in minutes.
        with suppress(StoreError):
            if self._is_announced:
                self.store.delete(self._announcement_key)
            self.store.delete(self.key)

    def renew(self) -> None:
        """Write the lease, which renews it."""
        start = self.timing.now()
        if start - self._renewed_at > LAPSE_SECONDS:
            self._has_lapsed = True
        self.store.put(self.key, to_canonical_json({"kind": self.kind}))
        self._renewed_at = start

    def _renew_often(self) -> None:
        while not self._is_released.wait(RENEW_SECONDS):
            with suppress(StoreError):  # the next renewal comes long before the lease is stale
                self.renew()
                self.read_claims()

    def read_idle_claims(self) -> Claims:
        """Return all leases, as `read_claims` does. Raises StoreError if another one is live."""
        claims = self.read_claims()
        lease_keys = claims.find_live("run") + claims.find_live("collect")
        if lease_keys:
            raise StoreError(
                f"{self.store.uri}: in use by another process ({lease_keys[0]}): nothing was"
                " deleted. Try again when it has ended"
            )
        return claims

    def read_claims(self) -> Claims:
        """Return all leases and the store's time, which is that of this lease: renew it before.

        Raises:
            StoreError: the lease is of kind `collect`, and no listing shows it; or every listing is
                empty, whatever was written.
        """
        for attempt in range(_LISTING_ATTEMPTS):
            if attempt:
                # A collection has deleted this lease, which was stale, or the listing is late.
                self.timing.sleep(0.1 * attempt)
                self.renew()
            modified = {listed.key: listed.modified for listed in self.store.list_objects(FOLDER)}
            now = modified.pop(self.key, None)
            if now is not None:
                self._note_time(now)
                return Claims(modified, now)
        problem = f"{self.store.uri}: the store's listing does not show {self.key}, just written"
        if self.kind == "collect":
            raise StoreError(f"{problem}: nothing more was deleted. Try again later")
        if next(iter(self.store.list_objects()), None) is None:
            # Of a page of HTML with status 200 the library makes an empty listing.
            raise StoreError(
                f"{self.store.uri}: the store's listings are empty, though {self.key} was just"
                " written: what answers is no object storage (the page of a proxy or a captive"
                " portal, say). Check the endpoint and the network, then run again"
            )
        log.warning("%s: do not run 'mmerge gc' there while a build runs", problem)
        latest = max(modified.values(), default=datetime.now().astimezone())
        return Claims(modified, latest)

    def _note_time(self, modified: datetime) -> None:
        """Compare two renewals by the store's clock: a suspended machine's can stand still."""
        if self._modified is not None:
            gap = (modified - self._modified).total_seconds()
            self._has_lapsed |= gap > LAPSE_SECONDS
        self._modified = modified

    def find_others(self, kind: LeaseKind) -> list[str]:
        """Renew this lease, and return the keys of the live leases of a kind, without this one."""
        self.renew()
        return self.read_claims().find_live(kind)

    def wait_for_none(
        self, kind: LeaseKind, *, seconds: float = 3600.0, pause: float = 2.0
    ) -> None:
        """Return when no live lease of a kind is left; look every `pause` seconds.

        Stale leases of the kind are fenced: their processes, should they go on, end.

        Raises:
            StoreError: that takes longer than `seconds`.
        """
        deadline = self.timing.now() + seconds
        is_logged = False
        while True:
            self.renew()
            claims = self.read_claims()
            lease_keys = claims.find_live(kind)
            if not lease_keys:
                self._fence(claims, kind)
                return
            if self.timing.now() > deadline:
                raise StoreError(
                    f"{self.store.uri}: {lease_keys[0]} is held by another process. Wait for it to"
                    " end, or delete that object"
                )
            if not is_logged:
                log.info("%s: waiting for 'mmerge gc' to end (%s)", self.store.uri, lease_keys[0])
                is_logged = True
            self.timing.sleep(pause)

    def _fence(self, claims: Claims, kind: LeaseKind) -> None:
        for lease_key in claims.find_stale(kind):
            if fence_key(lease_key) not in claims.modified:
                self.store.put(fence_key(lease_key), to_canonical_json({"fenced": lease_key}))

    def announce(self, keys: Iterable[str]) -> None:
        """Announce the keys of the build that is about to be committed.

        A collection that lists `claims/` from now on leaves them alone (`ANNOUNCEMENT_LIFE`).
        """
        self._is_announced = True
        data = to_canonical_json({"keys": sorted(keys)})
        self.store.put(self._announcement_key, data)

    def has_lapsed(self) -> bool:
        """Return whether other processes may have taken this lease for stale; asks no store."""
        return self._has_lapsed or self.timing.now() - self._renewed_at > LAPSE_SECONDS


def fence_key(lease_key: str) -> str:
    """Return the key of the object that ends the process of a stale lease."""
    return f"{FOLDER}/fence-{lease_key.removeprefix(FOLDER + '/')}"


def read_announced_keys(store: Store, claims: Claims) -> set[str]:
    """Return the keys that runs have announced to commit.

    Raises:
        StoreError: an announcement is damaged.
    """
    keys: set[str] = set()
    for key in claims.find_live("commit", life=ANNOUNCEMENT_LIFE):
        try:
            raw = parse_json(store.read(key, max_bytes=MAX_ANNOUNCEMENT_BYTES), what=key)
            keys.update(map(str, raw["keys"]))
        except NotFound:
            continue  # that run has ended: its reference is in the listing that follows
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{store.uri}: {key} is damaged ({error}): nothing was deleted. Delete that object"
                " when no run is active"
            ) from error
    return keys
