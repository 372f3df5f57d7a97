"""Stores in the memory of this process, `memory://NAME`, for tests."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

from typing_extensions import Self, override

from mmerge.manifests.errors import AlreadyExists, NotFound
from mmerge.manifests.stores.base import Listed, OnPart, Store, check_key
from mmerge.manifests.stores.writer import BufferedSink


@dataclass(frozen=True)
class _Object:
    data: bytes
    version: int
    modified: datetime


@dataclass
class _Contents:
    """The objects of one URI, shared by all stores of that URI that are alive."""

    objects: dict[str, _Object] = field(default_factory=dict)
    num_writes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_contents_by_uri: weakref.WeakValueDictionary[str, _Contents] = weakref.WeakValueDictionary()


class MemoryStore(Store):
    """A dictionary of objects. Stores of one URI share it; it ends with the last of them."""

    is_remote = False

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._contents = _contents_by_uri.setdefault(uri, _Contents())

    @classmethod
    @override
    def open(cls, uri: str, *, create: bool) -> Self:
        return cls(uri)

    def _find(self, key: str) -> _Object:
        stored = self._contents.objects.get(check_key(key))
        if stored is None:
            raise NotFound(f"{self.uri}: {key}: not found")
        return stored

    @override
    def num_bytes(self, key: str) -> int:
        return len(self._find(key).data)

    @override
    def identity(self, key: str) -> str:
        return str(self._find(key).version)

    @override
    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        data = self._find(key).data
        self.check_range_end(key, offset=offset, num_bytes=num_bytes, end=len(data))
        part = memoryview(data)[offset : offset + num_bytes]
        on_part(part)
        return part

    @override
    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        folder = f"{prefix.rstrip('/')}/" if prefix else ""
        for key, stored in list(self._contents.objects.items()):
            if key.startswith(folder):
                yield Listed(key, len(stored.data), stored.modified)

    @override
    def put_new(self, key: str, data: bytes) -> None:
        self._put(key, data, replace=False)

    @override
    def put(self, key: str, data: bytes) -> None:
        self._put(key, data, replace=True)

    def _put(self, key: str, data: bytes, *, replace: bool) -> None:
        check_key(key)
        contents = self._contents
        with contents.lock:
            if not replace and key in contents.objects:
                raise AlreadyExists(f"{self.uri}: {key}: already exists")
            contents.num_writes += 1
            now = datetime.now(timezone.utc)
            contents.objects[key] = _Object(bytes(data), contents.num_writes, now)

    @override
    def open_sink(self, key: str) -> BufferedSink:
        return BufferedSink(lambda data: self.put(key, data))

    @override
    def delete(self, key: str) -> None:
        self._contents.objects.pop(check_key(key), None)
