"""Object storage seen as names and bytes: few verbs over the obstore library.

A store is opened by URI: a folder (`build/store` or `file:///data/store`), `memory://NAME` (this
process only, for tests), `s3://`, `gs://` or `az://` with BUCKET/PATH, or, to read from,
`hf://ORG/REPO@REVISION`.
"""

from __future__ import annotations

import random
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import BaseError
from obstore.store import LocalStore, MemoryStore

from mmerge.manifests.errors import NotFound, StoreError, StoreUnavailable
from mmerge.manifests.stores.clients import make_client, read_limits, scheme_of
from mmerge.manifests.stores.error_translation import Translated, first_line
from mmerge.manifests.stores.local import Folder, is_partial
from mmerge.manifests.stores.local_reads import read_local, read_local_start
from mmerge.manifests.stores.prefetch import (
    CHUNK_BYTES,
    PART_BYTES,
    ForwardReader,
    OnPart,
    read_in_parts,
)
from mmerge.manifests.stores.writer import ObjectWriter

COALESCE_BYTES = 1 << 20
"""Ranges that are nearer than this are read in one request."""
CHECKED_BYTES = 64 << 20
"""Before a larger range is read, the object's size is asked for."""
MAX_READ_BYTES = 256 << 20
"""What `read` takes into memory if it is not told otherwise."""
READ_ATTEMPTS = 3
"""How often a read is begun: the library repeats requests, not answers that break off."""

_was_opened = threading.Event()
_memory_stores: weakref.WeakValueDictionary[str, MemoryStore] = weakref.WeakValueDictionary()
_Value = TypeVar("_Value")


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
    """One object of a listing: its key, its size in bytes, and when it was written last (UTC)."""

    key: str
    num_bytes: int
    modified: datetime


class Store:
    """One folder or bucket prefix. All verbs take keys relative to it; errors name store and key."""

    def __init__(self, uri: str, inner: Any, *, folder: Folder | None = None) -> None:
        self.uri = uri
        self.honours_create = True
        """False where `check_store` found that a server lets several writers create one key
        (manifests/stores/create_check.py).
        """
        self._inner = inner
        self._folder = folder
        self._is_remote = folder is None and not uri.startswith("memory://")
        self._forward: dict[str, ForwardReader] = {}

    @property
    def is_remote(self) -> bool:
        """Whether each verb is a request over the network."""
        return self._is_remote

    @property
    def folder(self) -> Folder | None:
        """The folder that the store is, None of any other kind."""
        return self._folder

    def translated(self, key: str) -> Translated:
        """Return a context in which the library's errors become ours, with this store and `key` in
        the message.
        """
        return Translated(self.uri, key, is_remote=self._is_remote)

    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """Return all bytes of one object. Raises NotFound, and StoreError before it reads an object
        of more than `max_bytes`.
        """

        def read_whole() -> bytes:
            result = obstore.get(self._inner, self._place(key))
            num_bytes = int(result.meta["size"])
            if num_bytes > max_bytes:
                raise StoreError(
                    f"{self.uri}: {key}: has {num_bytes:,} bytes, at most {max_bytes:,} are read"
                )
            data = bytes(result.bytes())
            if len(data) != num_bytes:
                raise StoreUnavailable(
                    f"{self.uri}: {key}: {len(data):,} of {num_bytes:,} bytes arrived"
                )
            return data

        return self._retry(key, read_whole)

    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        """Return exactly `num_bytes` bytes from `offset` (bytes). Raises NotFound, StoreError when
        the object is shorter.

        `on_part` is told of them in their order, of a large range over a network piece by piece
        while the next are on their way.
        """
        if num_bytes == 0:
            return memoryview(b"")
        if self._is_remote and num_bytes > PART_BYTES:
            if num_bytes > CHECKED_BYTES:  # memory is taken only for what is there
                self._check_length(key, 0, offset, num_bytes, end=self.num_bytes(key))
            return read_in_parts(
                lambda start, part: self._read_into(key, start, part),
                offset,
                num_bytes,
                on_part=on_part,
            )
        data = self._read_part(key, offset, num_bytes)
        on_part(data)
        return data

    def read_start(self, key: str, *, num_bytes: int) -> tuple[memoryview, int]:
        """Return the first `num_bytes` bytes of an object, fewer if it is shorter, and the size of
        the whole, in one request.

        Raises NotFound; StoreError for an object without any byte.
        """

        def read_once() -> tuple[memoryview, int]:
            result = obstore.get(self._inner, self._place(key), options={"range": (0, num_bytes)})
            whole, data = int(result.meta["size"]), memoryview(result.bytes())
            if len(data) != min(num_bytes, whole):
                raise StoreUnavailable(
                    f"{self.uri}: {key}: {len(data):,} of {min(num_bytes, whole):,} bytes arrived"
                )
            return data, whole

        if (
            self._folder is not None
        ):  # the library hands each request to a thread of its own: milliseconds, where others read
            with self.translated(key):
                return read_local_start(self._folder.place(check_key(key)), num_bytes=num_bytes)
        return self._retry(key, read_once)

    def read_blocks(
        self,
        key: str,
        *,
        offset: int,
        num_bytes: int,
        block_bytes: int,
        into: NDArray[np.uint8] | None = None,
    ) -> Iterator[NDArray[np.uint8]]:
        """Yield the bytes of `read_range` in blocks, to be read from while each is the current one.

        With `into`, uint8 [num_bytes], the blocks lie there one behind the other and stay. A local
        file is read block by block as they are asked for, so that whoever reads a block finds it in
        a cache.

        Raises NotFound, StoreError when the object is shorter or cannot be read.
        """
        if self._folder is None:
            whole = np.frombuffer(
                self.read_range(key, offset=offset, num_bytes=num_bytes), np.uint8
            )
            for start in range(0, num_bytes, block_bytes):
                block = whole[start : start + block_bytes]
                if into is not None:
                    np.copyto(into[start : start + block_bytes], block)
                yield block
            return
        with self.translated(key):
            path = self._folder.place(check_key(key))
            blocks = read_local(
                path, offset=offset, num_bytes=num_bytes, block_bytes=block_bytes, into=into
            )
        while True:
            try:
                with self.translated(key):
                    found: NDArray[np.uint8] | None = next(blocks, None)
            except EOFError as end:
                raise StoreError(
                    f"{self.uri}: {key}: asked for bytes {offset} to {offset + num_bytes}, it ends"
                    f" at {end}"
                ) from None
            if found is None:
                return
            yield found

    def read_forward(
        self, key: str, *, offset: int, num_bytes: int, start: int, stop: int
    ) -> memoryview:
        """Like `read_range`, for a reader that goes through bytes `start` to `stop` in order: the
        next ones are fetched meanwhile.

        One range of a key is read forward at a time; over a network at most `ahead.AHEAD_BYTES` are
        held for it.
        """
        if not self._is_remote or num_bytes == 0:
            return self.read_range(key, offset=offset, num_bytes=num_bytes)
        reader = self._forward.get(key)
        if reader is None or (reader.start, reader.stop) != (start, stop):
            if reader is not None:
                reader.close()
            reader = ForwardReader(
                lambda begin, size: self._read_large_part(key, begin, size), start=start, stop=stop
            )
            self._forward[key] = reader
        data = reader.read(offset, num_bytes)
        if offset + num_bytes >= stop:
            del self._forward[key]
        return data

    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Return several ranges, (offset, bytes) each, of one object: near ones in one request, all
        in parallel.

        Raises NotFound, StoreError when the object is shorter.
        """
        starts, lengths = [offset for offset, _ in ranges], [num_bytes for _, num_bytes in ranges]

        def read_all() -> list[memoryview]:
            found = obstore.get_ranges(
                self._inner,
                self._place(key),
                starts=starts,
                lengths=lengths,
                coalesce=COALESCE_BYTES,
            )
            data = [memoryview(one) for one in found]
            for one, (offset, num_bytes) in zip(data, ranges, strict=True):
                self._check_length(key, len(one), offset, num_bytes)
            return data

        return self._retry(key, read_all) if ranges else []

    def _read_part(self, key: str, offset: int, num_bytes: int) -> memoryview:
        def read_once() -> memoryview:
            data = memoryview(
                obstore.get_range(self._inner, self._place(key), start=offset, length=num_bytes)
            )
            self._check_length(key, len(data), offset, num_bytes)
            return data

        return self._retry(key, read_once)

    def _read_large_part(self, key: str, offset: int, num_bytes: int) -> memoryview:
        part = np.empty(num_bytes, np.uint8)
        self._read_into(key, offset, part)
        return part.data.toreadonly()

    def _read_into(self, key: str, offset: int, part: NDArray[np.uint8]) -> None:
        def read_once() -> None:
            result = obstore.get(
                self._inner, self._place(key), options={"range": (offset, offset + len(part))}
            )
            arrived = 0
            for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
                data = np.frombuffer(chunk, np.uint8)
                part[arrived : arrived + len(data)] = data
                arrived += len(data)
            self._check_length(key, arrived, offset, len(part))

        self._retry(key, read_once)

    def _check_length(
        self, key: str, arrived: int, offset: int, num_bytes: int, *, end: int | None = None
    ) -> None:
        found = offset + arrived if end is None else end
        if found < offset + num_bytes:
            raise StoreError(
                f"{self.uri}: {key}: asked for bytes {offset} to {offset + num_bytes}, it ends at"
                f" {found}"
            )

    def num_bytes(self, key: str) -> int:
        """Return the size of one object in bytes. Raises NotFound."""
        return int(self._retry(key, lambda: obstore.head(self._inner, self._place(key)))["size"])

    def identity(self, key: str) -> str:
        """Return a text that changes when the object is replaced: its size, entity tag and time of
        change. Raises NotFound.
        """
        meta = self._retry(key, lambda: obstore.head(self._inner, self._place(key)))
        return f"{meta['size']}:{meta['e_tag'] or ''}:{meta['last_modified'].isoformat()}"

    def exists(self, key: str) -> bool:
        """Return whether an object of that key is there."""
        try:
            self.num_bytes(key)
        except NotFound:
            return False
        return True

    def put_new(self, key: str, data: bytes) -> None:
        """Create one object in a single step. Raises AlreadyExists, and then leaves the object as
        it was.

        AlreadyExists may be this very call's doing, when the server's first answer was lost:
        compare what is there.
        """

        def create() -> None:
            place = self._place(key)
            if self._folder:
                self._folder.put_new(key, data)
            else:
                obstore.put(self._inner, place, data, mode="create", use_multipart=False)

        self._retry(key, create)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace one object: only for names whose content is a function of the name, and
        for caches.
        """

        def replace() -> None:
            place = self._place(key)
            if self._folder:
                self._folder.put(key, data)
            else:
                obstore.put(self._inner, place, data)

        self._retry(key, replace)

    def open_writer(self, key: str) -> ObjectWriter:
        """Return a context manager that streams one object; nothing is visible under `key` until it
        closes without error.
        """
        return ObjectWriter(self, check_key(key), inner=self._inner, folder=self._folder)

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below the folder `prefix` (all keys when empty), in no fixed order."""
        for listed in self.list_objects(prefix):
            yield listed.key

    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        """Yield what lies below the folder `prefix`, in no fixed order, without what is being
        written.
        """
        for listed in self._iterate(prefix):
            if not is_partial(listed.key):
                yield listed

    def list_partials(self) -> Iterator[Listed]:
        """Yield the files of a local folder that were begun and not finished."""
        return (
            (listed for listed in self._iterate("") if is_partial(listed.key))
            if self._folder
            else iter(())
        )

    def _iterate(self, prefix: str) -> Iterator[Listed]:
        with self.translated(prefix):
            if self._folder:
                for key, status in self._folder.iterate_keys(prefix):
                    yield Listed(
                        key, status.st_size, datetime.fromtimestamp(status.st_mtime, timezone.utc)
                    )
                return
            for batch in obstore.list(self._inner, prefix=prefix or None):
                for meta in batch:
                    yield Listed(str(meta["path"]), int(meta["size"]), meta["last_modified"])

    def delete(self, key: str) -> None:
        """Delete one object; deleting what is not there is no error."""
        try:
            self._retry(key, lambda: obstore.delete(self._inner, self._place(key)))
        except NotFound:
            return

    def _place(self, key: str) -> str:
        if self._folder:
            self._folder.place(check_key(key))
        return check_key(key)

    def _retry(self, key: str, operation: Callable[[], _Value]) -> _Value:
        """Return what `operation` returns; over a network, begin again where a connection broke,
        while there is time.
        """
        began = time.monotonic()
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                with self.translated(key):
                    return operation()
            except StoreUnavailable:
                if (
                    not self._is_remote
                    or attempt == READ_ATTEMPTS
                    or time.monotonic() - began > read_limits().retry_seconds
                ):
                    raise
                time.sleep(random.uniform(0.1, 0.5) * 2**attempt)
        raise AssertionError("unreachable")


def is_local(uri: str) -> bool:
    """Return whether `uri` names a folder of this machine."""
    return not re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+://", uri) or uri.startswith("file://")


def to_local_path(uri: str) -> Path:
    """Return the folder that a local `uri` names."""
    return Path(uri.removeprefix("file://"))


def open_store(uri: str, *, create: bool = False) -> Store:
    """Return the store at `uri`; with `create` a local folder is made if it is missing.

    Raises:
        NotFound: a local folder, or a repository of the hub, is not there.
        StoreError: the URI is not understood, or the folder cannot be made.
    """
    _was_opened.set()
    if uri.startswith("memory://"):
        inner: Any = _memory_stores.get(uri)
        if inner is None:
            inner = _memory_stores[uri] = MemoryStore()
        return Store(uri, inner)
    if is_local(uri):
        return _open_folder(to_local_path(uri).absolute(), create=create)
    if scheme_of(uri) == "hf":
        from mmerge.manifests.stores.hub import open_hub

        return open_hub(uri)
    return Store(uri.rstrip("/"), make_client(uri))


def was_any_opened() -> bool:
    """Return whether this process has opened a store, so that the library behind stores may have
    begun threads.
    """
    return _was_opened.is_set()


def _open_folder(path: Path, *, create: bool) -> Store:
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path}: is a file, a store is a folder or bucket. Choose another place")
    if not create and not path.is_dir():
        raise NotFound(f"{path}: no such folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        return Store(str(path), LocalStore(path), folder=Folder(path))
    except (OSError, BaseError) as error:
        raise StoreError(
            f"{path}: cannot be made ({first_line(error)}). Choose another 'output' or grant write"
            " access"
        ) from error
