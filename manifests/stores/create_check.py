"""A check of what a store really does: whether it can be written, and whether create is atomic.

The commit of a build rests on create (`If-None-Match: *`). A server that ignores it, or that looks
first and writes later, lets two writers succeed. That is harmless for manifests, which are equal
byte for byte; a reference is read again after it was written (manifests/format/references.py).

The verdict costs 82 requests. It is kept in the store as `probe/verdict-DIGEST.json`, where DIGEST
identifies the server and this check, until garbage collection deletes it after its grace period.
"""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import ThreadPoolExecutor

from mmerge.manifests.digest import digest_json, parse_json, to_canonical_json
from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError, first_line
from mmerge.manifests.stores.base import Store

NUM_WRITERS = 8
NUM_ROUNDS = 8
"""OpenStack Swift, whose create looks first and writes later, let a single writer succeed in 26 of
30 rounds of four writers, and in 11 of 30 rounds of eight: eight rounds of eight detect it in more
than 999 of 1,000 checks.
"""
CHECK_VERSION = 1
"""To be raised when the check changes: verdicts of earlier versions are then ignored."""
MAX_VERDICT_BYTES = 1 << 10

log = logging.getLogger("mmerge.store")


def check_store(store: Store) -> bool:
    """Return whether the store lets exactly one of several writers create a key; log if not.

    A local store does by the guarantee of its file system. A remote one is tried once, and its
    verdict is read from the store from then on.

    Raises:
        StoreError: the store cannot be written; the message has the remedy.
    """
    _check_writable(store)
    is_atomic = not store.is_remote or _has_atomic_create(store)
    if not is_atomic:
        log.warning(
            "%s: this store lets several writers create one object. Builds stay right: manifests"
            " are equal byte for byte and references are read back; but do not let two different"
            " builds move one name at the same moment",
            store.uri,
        )
    return is_atomic


def _check_writable(store: Store) -> None:
    key = f"probe/{secrets.token_hex(8)}/writable"
    try:
        store.put(key, b"ok")
    except StoreError as error:
        reason = first_line(error)
        raise type(error)(
            f"{store.uri}: cannot be written ({reason}). Choose another 'output' or grant write"
            " access"
        ) from error
    store.delete(key)


def verdict_key(store: Store) -> str:
    """Return the key of the verdict on the server that is behind a store."""
    return f"probe/verdict-{digest_json([CHECK_VERSION, store.backend])[:16]}.json"


def has_racy_create(store: Store) -> bool:
    """Return whether the kept verdict says that several writers can create one key."""
    return store.is_remote and _read_verdict(store) is False


def _has_atomic_create(store: Store) -> bool:
    is_atomic = _read_verdict(store)
    if is_atomic is None:
        is_atomic = _try_creates(store)
        store.put(verdict_key(store), to_canonical_json({"atomic_create": is_atomic}))
    return is_atomic


def _read_verdict(store: Store) -> bool | None:
    """Return the stored verdict, None if there is none that can be read."""
    key = verdict_key(store)
    try:
        verdict = parse_json(store.read(key, max_bytes=MAX_VERDICT_BYTES), what=key)
    except (NotFound, ValueError):
        return None
    is_atomic = verdict.get("atomic_create") if isinstance(verdict, dict) else None
    return is_atomic if isinstance(is_atomic, bool) else None


def _try_creates(store: Store) -> bool:
    """Return whether exactly one of several writers creates a key, and none after it, per round."""
    prefix = f"probe/{secrets.token_hex(8)}"
    keys: list[str] = []
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        try:
            for number in range(NUM_ROUNDS):
                key = f"{prefix}/create-{number}"
                keys.append(key)
                attempts = [
                    pool.submit(_create, store, key, writer) for writer in range(NUM_WRITERS)
                ]
                if sum(attempt.result() for attempt in attempts) != 1:
                    return False
            late_writers = pool.map(lambda key: _create(store, key, NUM_WRITERS), keys)
            return not any(late_writers)
        finally:
            list(pool.map(store.delete, keys))


def _create(store: Store, key: str, writer: int) -> bool:
    data = f"writer {writer}".encode()
    try:
        store.put_new(key, data)
    except AlreadyExists:
        # After a lost answer the object can be this writer's own.
        return _is_stored(store, key, data)
    return True


def _is_stored(store: Store, key: str, data: bytes) -> bool:
    try:
        return store.read(key, max_bytes=MAX_VERDICT_BYTES) == data
    except NotFound:
        return False
