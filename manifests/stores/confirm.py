"""Confirmed writes: an object counts as stored once it was read back and is equal.

A server can answer that it stored an object and keep nothing, half of it, or other bytes. And it
can create an object and lose its answer: the repeated request is then told that the object exists.
Whose object it is follows from its content.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreUnavailable
from mmerge.manifests.stores.base import Store
from mmerge.manifests.stores.create_check import has_racy_create

ATTEMPTS = 4
PAUSE_SECONDS = 0.2
"""The first pause between attempts, on average; each further one is twice as long."""
Sleep = Callable[[float], object]


@dataclass(frozen=True)
class Stored:
    """What is stored under a key after an attempt to create it."""

    data: bytes
    """Equal to what was sent, or another writer's object."""
    is_new: bool
    """Whether the store said that the object was created. It may be this call's own if not."""


def create(
    store: Store,
    key: str,
    data: bytes,
    *,
    check: Callable[[], None] = lambda: None,
    sleep: Sleep = time.sleep,
) -> Stored:
    """Create an object unless there is one, and return what is stored under `key` then.

    An object of this call that the server stored with other bytes is deleted and created again.
    Two writers with equal data both succeed, so `data` must have a unique part where that matters.
    `check` is called immediately before each request; what it raises ends the call.

    Raises:
        StoreUnavailable: the server stored nothing, or other bytes, at every attempt.
        StoreError: the store cannot be written.
    """
    reason = "stored nothing"
    for _ in _attempts(sleep):
        is_created = True
        check()
        try:
            store.put_new(key, data)
        except AlreadyExists:
            is_created = False
        stored = _read_twice(store, key, expected=data)
        if stored is None:
            # A lost race whose winner was deleted or has failed, or an answer that was wrong.
            continue
        if stored == data or not is_created or has_racy_create(store):
            return Stored(stored, is_created)
        # The create was atomic and ours, so nobody else wrote these bytes.
        store.delete(key)
        reason = "stored other bytes than it was sent"
    raise _unconfirmed(store, key, reason)


def put(store: Store, key: str, data: bytes, *, sleep: Sleep = time.sleep) -> None:
    """Create or replace a small object, and read it back.

    Raises:
        StoreUnavailable: the server stored nothing, or other bytes, at every attempt.
        StoreError: the store cannot be written.
    """
    reason = "stored nothing"
    for _ in _attempts(sleep):
        store.put(key, data)
        stored = _read_twice(store, key, expected=data)
        if stored == data:
            return
        if stored is not None:
            reason = "stored other bytes than it was sent"
    raise _unconfirmed(store, key, reason)


def _attempts(sleep: Sleep) -> Iterator[int]:
    """Yield the number of each attempt, after a pause that doubles from the second one on."""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(PAUSE_SECONDS * random.uniform(0.5, 1.5) * 2 ** (attempt - 1))
        yield attempt


def _read_twice(store: Store, key: str, *, expected: bytes) -> bytes | None:
    """Return the stored bytes, None if there are none; a difference is read a second time.

    One read may be damaged on its way.
    """
    try:
        stored = store.read(key)
        return stored if stored == expected else store.read(key)
    except NotFound:
        return None


def _unconfirmed(store: Store, key: str, reason: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{store.uri}: {key}: the store reported success {ATTEMPTS} times, but {reason}. Check the"
        " server or the network, then run again"
    )
