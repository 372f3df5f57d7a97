"""Small stored files whose keys follow from their bytes: created once, repaired where damaged."""

from __future__ import annotations

from typing import Literal

from mmerge.manifests.errors import NotFound, StoreError, StoreUnavailable
from mmerge.manifests.stores import confirm
from mmerge.manifests.stores.base import Store

PutResult = Literal["present", "created", "repaired"]


def put_file(store: Store, key: str, data: bytes) -> PutResult:
    """Make the object of `key` hold `data`; return whether it did already.

    Only for keys that hold the digest of their bytes: an object with other bytes is damaged, and is
    written again.
    """
    try:
        if store.read(key, max_bytes=max(len(data), 1)) == data:
            return "present"
    except StoreUnavailable:
        raise
    except NotFound:
        confirm.put(store, key, data)
        return "created"
    except StoreError:
        pass  # longer than it should be, or unreadable
    confirm.put(store, key, data)
    return "repaired"
