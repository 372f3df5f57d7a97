"""The store interface: what every place that holds builds or checkpoints offers.

A store maps keys (relative names such as `objects/DIGEST.safetensors`) to bytes. `ReadableStore`
has the verbs that read, `Store` adds those that write. A third party implements the abstract
methods only; all others have defaults that a store overrides where it can be faster.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.stores.local_file import LocalFile, read_blocks_of
from mmerge.manifests.stores.writer import ObjectSink, ObjectWriter

MAX_READ_BYTES = 256 << 20
"""Limit of `read` unless the caller sets another."""

OnPart = Callable[[memoryview], object]
"""Receives the bytes of a range in order; for example the `update` method of a digest."""


def check_key(key: str) -> str:
    """Return `key` if it is a plain relative name that cannot leave its store.

    Raises:
        StoreError: the key is empty, absolute, or has an empty, `.` or `..` part.
    """
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{key!r} is no valid object name: use a relative name without '..'")
    return key


@dataclass(frozen=True)
class Listed:
    """One object of a listing: its key, its size in bytes, and its time of last change (UTC)."""

    key: str
    num_bytes: int
    modified: datetime


@dataclass(frozen=True)
class DeferredCommit:
    """A written file of a local store that has no name yet, and may not be on the disk."""

    key: str
    """The name that it gets."""
    temporary_name: str
    """Its current name, in the folder of `key`."""


class ReadableStore(ABC):
    """A store that can be read.

    Call order:
        1. `open_store` or `open_readable_store` calls `open` of the class that is registered for
           the URI's scheme. Nothing has to be asked of a server yet.
        2. Any thread calls any verb, in any order. `read_forward` is the exception: one thread per
           key at a time.
        3. Nobody closes a store; what it holds ends with the object.

    Every verb checks its key with `check_key` first, raises NotFound for a missing object,
    StoreUnavailable where asking again can help, and StoreError otherwise. Messages begin with the
    store's URI and the key.
    """

    is_remote: ClassVar[bool] = True
    """Whether each verb is a request over a network."""
    prefetch_bytes: ClassVar[int] = 0
    """The most memory that `read_forward` holds for one key beyond what it returned."""

    uri: str
    """The URI that opens this store again, without a trailing slash."""

    @classmethod
    @abstractmethod
    def open(cls, uri: str, *, create: bool) -> Self:
        """Return the store at `uri`; with `create`, a missing folder or container is made.

        Raises:
            NotFound: there is no such place.
            StoreError: the URI is not understood, or the place cannot be made.
        """

    @classmethod
    def pin(cls, uri: str) -> str:
        """Return the URI of the immutable version that `uri` names now, `uri` itself by default."""
        return uri

    @abstractmethod
    def num_bytes(self, key: str) -> int:
        """Return the size of one object in bytes. Raises NotFound."""

    @abstractmethod
    def identity(self, key: str) -> str:
        """Return a text that changes when the object is replaced. Raises NotFound."""

    @abstractmethod
    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        """Return exactly `num_bytes` bytes from `offset` (bytes).

        `on_part` receives them in order; a store that fetches a large range in parts calls it for
        each part while the next ones are on their way.

        Raises:
            NotFound: there is no such object.
            StoreError: the object is shorter.
        """

    @abstractmethod
    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        """Yield the complete objects below the folder `prefix`, all when empty, in any order."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below the folder `prefix`, all keys when empty, in any order."""
        for listed in self.list_objects(prefix):
            yield listed.key

    def exists(self, key: str) -> bool:
        """Return whether there is an object of that key."""
        try:
            self.num_bytes(key)
        except NotFound:
            return False
        return True

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """Return all bytes of one object.

        Raises:
            NotFound: there is no such object.
            StoreError: it has more than `max_bytes` bytes; nothing of it was read.
        """
        num_bytes = self.num_bytes(key)
        self.check_read_size(key, num_bytes, max_bytes=max_bytes)
        return bytes(self.read_range(key, offset=0, num_bytes=num_bytes))

    def read_start(self, key: str, *, num_bytes: int) -> tuple[memoryview, int]:
        """Return the first `num_bytes` bytes of an object, all if it is shorter, and its size.

        Raises:
            NotFound: there is no such object.
            StoreError: the object is empty.
        """
        object_bytes = self.num_bytes(key)
        if not object_bytes:
            raise StoreError(f"{self.uri}: {key}: the object is empty")
        num_bytes = min(num_bytes, object_bytes)
        return self.read_range(key, offset=0, num_bytes=num_bytes), object_bytes

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> Sequence[memoryview]:
        """Return several ranges (offset, bytes) of one object. Raises as `read_range`."""
        return [
            self.read_range(key, offset=offset, num_bytes=num_bytes) for offset, num_bytes in ranges
        ]

    def read_forward(
        self, key: str, *, offset: int, num_bytes: int, start: int, stop: int
    ) -> memoryview:
        """Return a range as `read_range` does, for a reader that goes through `start` to `stop`.

        A remote store fetches the next bytes meanwhile, and holds at most `prefetch_bytes` of them
        per key. One range of a key is read forward at a time.
        """
        return self.read_range(key, offset=offset, num_bytes=num_bytes)

    def read_blocks(
        self,
        key: str,
        *,
        offset: int,
        num_bytes: int,
        block_bytes: int,
        into: NDArray[np.uint8] | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of a range in blocks, uint8; a block is valid until the next one.

        With `into`, uint8 [num_bytes], the blocks are consecutive slices of it and stay valid. A
        local file is read block by block on demand, so that the consumer finds each block in the
        processor's caches.

        Raises:
            NotFound: there is no such object.
            StoreError: the object is shorter or cannot be read.
        """
        file = self.open_local_file(key)
        if file is not None:
            with file:
                yield from read_blocks_of(
                    file, offset=offset, num_bytes=num_bytes, block_bytes=block_bytes, into=into
                )
            return
        data = self.read_range(key, offset=offset, num_bytes=num_bytes)
        whole = np.frombuffer(data, np.uint8)
        for start in range(0, num_bytes, block_bytes):
            block = whole[start : start + block_bytes]
            if into is not None:
                np.copyto(into[start : start + block_bytes], block)
            yield block

    def open_local_file(self, key: str) -> LocalFile | None:
        """Return the open file of an object, None in a store whose objects are no local files.

        Raises:
            NotFound: there is no such object.
        """
        return None

    def check_read_size(self, key: str, num_bytes: int, *, max_bytes: int) -> None:
        """Raise StoreError if an object of `num_bytes` bytes is too large for `read`."""
        if num_bytes > max_bytes:
            raise StoreError(
                f"{self.uri}: {key}: has {num_bytes:,} bytes, at most {max_bytes:,} are read"
            )

    def check_range_end(self, key: str, *, offset: int, num_bytes: int, end: int) -> None:
        """Raise StoreError if a range reaches beyond `end`, the size of the object."""
        if end < offset + num_bytes:
            raise StoreError(
                f"{self.uri}: {key}: bytes {offset} to {offset + num_bytes} were requested, it ends"
                f" at {end}"
            )


class Store(ReadableStore):
    """A store that can also be written.

    How a build writes (manifests/FORMAT.md has the protocol):
        1. The driver calls `check_store` (create_check.py), then puts its lease.
        2. Workers stream objects with `open_writer`, then `put` their entries. Both may be repeated
           by anyone with the same bytes, so replacing is harmless.
        3. The driver commits the build: `put_new` of the manifest, then of the reference.
        4. Garbage collection calls `list_objects`, `list_partials` and `delete`.

    A local store may defer the commits of step 2: a worker writes within `defer_commits`, and the
    driver calls `commit` with the list once it has time to wait for the disk.

    Writes are atomic: an object is visible whole or not at all.
    """

    @property
    def backend(self) -> str:
        """Text that identifies the server; `check_store` keeps one verdict for each."""
        return self.uri.partition("://")[0]

    @abstractmethod
    def put_new(self, key: str, data: bytes) -> None:
        """Create one object in a single step; of several concurrent callers exactly one succeeds.

        Raises:
            AlreadyExists: the key exists; its object is unchanged. After a lost response the object
                may be this call's own: compare the content.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> None:
        """Create or replace one object in a single step.

        Only for keys whose content is a function of the key, and for caches.
        """

    @abstractmethod
    def open_sink(self, key: str) -> ObjectSink:
        """Return a sink that streams one object. `open_writer` is its only caller."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Delete one object; a missing one is no error."""

    def open_writer(self, key: str) -> ObjectWriter:
        """Return a context manager that streams one object, and counts and hashes its bytes.

        Nothing is visible under `key` until the context ends without an error.
        """
        return ObjectWriter(check_key(key), self.open_sink(key))

    def list_partials(self) -> Iterator[Listed]:
        """Yield incomplete files that interrupted writers left in a listing of their own."""
        return iter(())

    @contextmanager
    def defer_commits(self) -> Iterator[list[DeferredCommit]]:
        """Defer the commits of `put` and `open_writer` within the context, and collect them.

        After an error the written files are deleted. A store without deferred commits yields a list
        that stays empty.
        """
        yield []

    def commit(self, deferred: Sequence[DeferredCommit]) -> None:
        """Commit deferred files in order: each gets its name once its bytes are on the disk.

        Raises:
            StoreError: the disk fails, or a name would leave the store; the remaining files are
                deleted.
        """
        if deferred:
            raise StoreError(f"{self.uri}: {deferred[0].key}: this store defers no commits")
