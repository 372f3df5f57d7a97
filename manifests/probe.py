"""What a store really does: can it be written, and does it let only one of several writers create a key?

The protocol of a commit rests on create (`If-None-Match: *`). A server that ignores it, or that looks first and writes
later, lets two writers win. That is harmless for manifests, which are equal byte for byte; a reference is read again after
it was written (manifests/reference.py).
"""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import ThreadPoolExecutor

from mmerge.manifests.errors import AlreadyExists, StoreError
from mmerge.manifests.store import Store

NUM_WRITERS = 4
NUM_ROUNDS = 3

log = logging.getLogger("mmerge.store")


def check_store(store: Store) -> bool:
    """Return whether the store lets exactly one of several writers create a key, and remember it in `store.honours_create`.

    Raises:
        StoreError: the store cannot be written; the message has the way out.
    """
    prefix = f"probe/{secrets.token_hex(8)}"
    try:
        store.put(f"{prefix}/writable", b"ok")
    except StoreError as error:
        first = Exception.__str__(error).splitlines()[0]
        raise type(error)(f"{store.uri}: cannot be written ({first}). Choose another 'output' or grant write access") from error
    store.delete(f"{prefix}/writable")
    if store.is_remote:  # a local file system links a name once, by its own promise
        store.honours_create = all(_count_winners(store, f"{prefix}/create-{number}") == 1 for number in range(NUM_ROUNDS))
    if not store.honours_create:
        log.warning(
            "%s: this store lets several writers create one object. Builds stay right: manifests are equal byte for byte and "
            "references are read back; but do not let two different builds move one name at the same moment",
            store.uri,
        )
    return store.honours_create


def _count_winners(store: Store, key: str) -> int:
    """Return how many of several writers at once, and of one more after them, created the key."""
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        winners = sum(pool.map(lambda number: _try_create(store, key, number), range(NUM_WRITERS)))
    winners += _try_create(store, key, NUM_WRITERS)
    store.delete(key)
    return winners


def _try_create(store: Store, key: str, number: int) -> bool:
    try:
        store.put_new(key, f"writer {number}".encode())
    except AlreadyExists:
        return False
    return True
