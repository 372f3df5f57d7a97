"""Creates that succeed, and whose answer is lost: the retry finds the object that it made."""

from __future__ import annotations

import pytest

from mmerge.manifests.errors import AlreadyExists
from mmerge.manifests.stores.base import Store


def lose_answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every create of a store happen, and then say that the object was there already."""
    put_new = store.put_new

    def put_and_lose(key: str, data: bytes) -> None:
        put_new(key, data)
        raise AlreadyExists(key)

    monkeypatch.setattr(store, "put_new", put_and_lose)
