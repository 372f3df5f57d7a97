"""The state of a stored object: whether it is what its entry says, and which builds list it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from mmerge.manifests.errors import ManifestError, NotFound, StoreError, StoreUnavailable
from mmerge.manifests.format.entry import ObjectEntry
from mmerge.manifests.format.manifest import read_manifest
from mmerge.manifests.stores.base import ReadableStore

READ_BYTES = 16 << 20
"""Bytes of one read."""


def read_pieces(
    store: ReadableStore, key: str, *, num_bytes: int
) -> Iterator[tuple[int, memoryview]]:
    """Yield the first `num_bytes` bytes of an object in pieces, each with its offset in bytes."""
    for offset in range(0, num_bytes, READ_BYTES):
        piece_bytes = min(READ_BYTES, num_bytes - offset)
        yield (
            offset,
            store.read_forward(key, offset=offset, num_bytes=piece_bytes, start=0, stop=num_bytes),
        )


def digest_object(
    store: ReadableStore,
    key: str,
    *,
    num_bytes: int,
    on_bytes: Callable[[int], None] = lambda num_bytes: None,
) -> str:
    """Return the digest of the first `num_bytes` bytes of an object.

    Raises:
        NotFound: there is no such object.
        StoreError: it is shorter, or cannot be read.
    """
    digest = blake3()
    for _, data in read_pieces(store, key, num_bytes=num_bytes):
        digest.update(data)
        on_bytes(len(data))
    return str(digest.hexdigest())


def find_object_damage(
    store: ReadableStore, entry: ObjectEntry, *, read: bool = False
) -> str | None:
    """Return how an object differs from its entry, None if it does not.

    Existence and size are compared; with `read` the digest of its bytes, too.

    Raises:
        StoreUnavailable: the store does not answer.
    """
    try:
        num_bytes = store.num_bytes(entry.key)
        if num_bytes != entry.num_bytes:
            return f"has {num_bytes:,} bytes, its entry says {entry.num_bytes:,}"
        if read and digest_object(store, entry.key, num_bytes=num_bytes) != entry.digest:
            return "its digest differs from its entry's"
    except StoreUnavailable:
        raise
    except NotFound:
        return "is missing"
    except StoreError as error:
        return f"cannot be read ({Exception.__str__(error)})"
    return None


@dataclass(frozen=True)
class Listing:
    """A build that lists an object."""

    build: str
    entry: ObjectEntry


def find_listings(store: ReadableStore, key: str) -> list[Listing]:
    """Return the builds of a store that list an object; a damaged manifest lists nothing.

    Reads every manifest: only for the rare case that an object is not what it should be.
    """
    listings = []
    for manifest_key in sorted(store.list("builds")):
        parts = manifest_key.split("/")
        if len(parts) != 3 or parts[2] != "manifest.json":
            continue
        try:
            manifest = read_manifest(store, parts[1])
        except StoreUnavailable:
            raise
        except (ManifestError, StoreError):
            continue
        listings += [Listing(parts[1], entry) for entry in manifest.entries if entry.key == key]
    return listings
