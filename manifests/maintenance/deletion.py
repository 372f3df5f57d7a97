"""Delete objects in an order that leaves no dangling name, while a lease is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from mmerge.manifests.errors import StoreError
from mmerge.manifests.format.references import delete_reference, parse_reference_key
from mmerge.manifests.maintenance.lease import Lease

_CONCURRENT_DELETES = 8
_ORDER = ("builds/", "objects/", "files/", "surveys/", "probe/", "claims/")


def delete_keys(lease: Lease, keys: Sequence[str]) -> None:
    """Delete these keys under a lease of kind `collect`: what names an object before the object.

    So a killed collection leaves no dangling name: references go first, then manifests, tables, the
    entry that says an object is complete, and the object.

    Raises:
        StoreError: the process was suspended for so long that others may use the store again, or
            the store cannot be written; the remaining keys are still there.
    """
    num_deleted = 0

    def check() -> None:
        # Immediately before each request, since a process can be suspended anywhere. The fence
        # first: the clock is then read last.
        _check_fence(lease)
        if lease.has_lapsed():
            raise StoreError(
                f"{lease.store.uri}: this process was suspended, and others may use the store"
                f" again: {num_deleted} of {len(keys)} objects were deleted. Start it again"
            )

    def delete(key: str) -> None:
        check()
        lease.store.delete(key)

    for name, number in filter(None, map(parse_reference_key, keys)):
        delete_reference(lease.store, name, number, check=check)
        num_deleted += 1
    remaining = [key for key in keys if parse_reference_key(key) is None]
    for group in _groups(remaining):
        if lease.store.is_remote:
            with ThreadPoolExecutor(_CONCURRENT_DELETES) as pool:
                list(pool.map(delete, group))
        else:
            for key in group:
                delete(key)
        num_deleted += len(group)


def _check_fence(lease: Lease) -> None:
    if lease.store.exists(lease.fence_key):
        raise StoreError(
            f"{lease.store.uri}: a run took this process for dead and uses the store"
            f" ({lease.fence_key}): nothing more was deleted. Start it again when the run has ended"
        )


def _groups(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield the keys in the order of deletion; those of one group in any order."""
    yield [key for key in keys if not key.startswith(_ORDER)]
    for prefix in _ORDER:
        below = [key for key in keys if key.startswith(prefix)]
        yield [key for key in below if key.endswith(".json")]
        yield [key for key in below if not key.endswith(".json")]
