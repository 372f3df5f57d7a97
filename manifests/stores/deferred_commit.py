"""What is written to a folder and has no name yet: collected where it is made, settled by who waits
for the disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mmerge.manifests.stores.local import Pending
from mmerge.manifests.stores.object_store import Store, check_key


@contextmanager
def collect_pending(store: Store) -> Iterator[Sequence[Pending]]:
    """Let what is put and streamed meanwhile wait for `settle`, and collect it in its order; after
    an error it is deleted.

    For who has more to do than to wait for a disk. Other stores than folders have nothing that
    waits.
    """
    if store.folder is None:
        yield []
        return
    found: list[Pending] = []
    store.folder.pending = found
    try:
        yield found
    except BaseException:
        for pending in found:
            store.folder.forget(pending)
        raise
    finally:
        store.folder.pending = None


def settle(store: Store, pending: Sequence[Pending]) -> None:
    """Give what is pending its names, one after the other, each once its bytes are on the disk;
    after an error the rest is deleted.

    Raises:
        StoreError: the disk refuses, or a name would leave the folder.
    """
    if store.folder is None:
        return
    left = list(pending)
    try:
        while left:
            first = left.pop(0)
            with store.translated(first.key):
                check_key(first.partial)
                store.folder.settle(first)
    finally:
        for one in left:
            store.folder.forget(one)
