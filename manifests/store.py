"""Object storage seen as names and bytes: few verbs over the obstore library.

A store is opened by URI: a folder (`build/store` or `file:///data/store`), `memory://NAME` (this process only, for
tests), or any URL that obstore knows (`s3://`, `gs://`, `az://`), with credentials from the environment.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import obstore
from blake3 import blake3
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import LocalStore, MemoryStore, from_url

from mmerge.manifests.errors import AlreadyExists, NotFound, StoreError

WRITER_BUFFER_BYTES = 8 << 20
"""Bytes a streaming writer holds before it sends a part."""
WRITER_CONCURRENCY = 4
"""Parts that are on their way at once."""

_memory_stores: weakref.WeakValueDictionary[str, MemoryStore] = weakref.WeakValueDictionary()
_from_url: Any = from_url  # its overloads list every vendor's options one by one
_CLIENT_OPTIONS: dict[str, Any] = {"timeout": timedelta(seconds=120), "connect_timeout": timedelta(seconds=10)}
_RETRY_CONFIG: dict[str, Any] = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}


def check_key(key: str) -> str:
    """Return `key` if it is a plain relative name that cannot leave its store.

    Raises:
        StoreError: the key is empty, absolute, or has an empty, `.` or `..` part.
    """
    parts = key.split("/")
    if not key or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{key!r} is no valid object name: use a relative name without '..'")
    return key


class Store:
    """One folder or bucket prefix. All verbs take keys relative to it; errors name store and key."""

    def __init__(self, uri: str, inner: Any) -> None:
        self.uri = uri
        self._inner = inner

    def read(self, key: str) -> bytes:
        """Return all bytes of one object. Raises NotFound."""
        with _Translated(self, key):
            return bytes(obstore.get(self._inner, check_key(key)).bytes())

    def read_range(self, key: str, *, offset: int, num_bytes: int) -> memoryview:
        """Return exactly `num_bytes` bytes from `offset` (bytes). Raises NotFound, StoreError when the object is shorter."""
        if num_bytes == 0:
            return memoryview(b"")
        with _Translated(self, key):
            data = memoryview(obstore.get_range(self._inner, check_key(key), start=offset, length=num_bytes))
        if len(data) != num_bytes:
            raise StoreError(f"{self.uri}: {key}: asked for bytes {offset} to {offset + num_bytes}, it ends at {offset + len(data)}")
        return data

    def num_bytes(self, key: str) -> int:
        """Return the size of one object in bytes. Raises NotFound."""
        with _Translated(self, key):
            return int(obstore.head(self._inner, check_key(key))["size"])

    def identity(self, key: str) -> str:
        """Return a text that changes when the object is replaced: its size, entity tag and time of change. Raises NotFound."""
        with _Translated(self, key):
            meta = obstore.head(self._inner, check_key(key))
        return f"{meta['size']}:{meta['e_tag'] or ''}:{meta['last_modified'].isoformat()}"

    def exists(self, key: str) -> bool:
        """Return whether an object of that key is there."""
        try:
            self.num_bytes(key)
        except NotFound:
            return False
        return True

    def put_new(self, key: str, data: bytes) -> None:
        """Create one object in a single step. Raises AlreadyExists, and then leaves the object as it was."""
        with _Translated(self, key):
            obstore.put(self._inner, check_key(key), data, mode="create", use_multipart=False)

    def put(self, key: str, data: bytes) -> None:
        """Create or replace one object: only for names whose content is a function of the name, and for caches."""
        with _Translated(self, key):
            obstore.put(self._inner, check_key(key), data)

    def open_writer(self, key: str) -> ObjectWriter:
        """Return a context manager that streams one object; nothing is visible under `key` until it closes without error."""
        return ObjectWriter(self, check_key(key))

    def list(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys below the folder `prefix` (all keys when empty), in no fixed order."""
        with _Translated(self, prefix):
            for batch in obstore.list(self._inner, prefix=prefix or None):
                for meta in batch:
                    yield str(meta["path"])

    def delete(self, key: str) -> None:
        """Delete one object; deleting what is not there is no error."""
        try:
            with _Translated(self, key):
                obstore.delete(self._inner, check_key(key))
        except NotFound:
            return

    def check_writable(self) -> None:
        """Write and delete a small object. Raises StoreError with the way out."""
        key = "probe/writable"
        try:
            self.put(key, b"ok")
        except StoreError as error:
            raise StoreError(
                f"{self.uri}: cannot be written ({_first_line(error)}). Choose another 'output' or grant write access"
            ) from error
        self.delete(key)


class ObjectWriter:
    """Streams one object and counts and digests what passes through."""

    def __init__(self, store: Store, key: str) -> None:
        self.key = key
        self.num_bytes = 0
        self._store = store
        self._digest = blake3()
        with _Translated(store, key):
            self._writer = obstore.open_writer(store._inner, key, buffer_size=WRITER_BUFFER_BYTES, max_concurrency=WRITER_CONCURRENCY)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, one byte per item. The caller may use its buffer again."""
        self._digest.update(data)
        self.num_bytes += len(data)
        with _Translated(self._store, self.key):
            self._writer.write(bytes(data))  # the library keeps a reference until the part is sent

    def hexdigest(self) -> str:
        """Return the BLAKE3 digest of everything written so far."""
        return str(self._digest.hexdigest())

    def __enter__(self) -> ObjectWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        # Closing commits. After an error the writer is dropped unclosed, so that no half object gets a name.
        if kind is None:
            with _Translated(self._store, self.key):
                self._writer.close()


class _Translated:
    """Turns the library's errors into ours, with store and key in the message."""

    def __init__(self, store: Store, key: str) -> None:
        self._where = f"{store.uri}: {key}" if key else store.uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if value is None or isinstance(value, StoreError):
            return
        if isinstance(value, (NotFoundError, FileNotFoundError, NotADirectoryError)):
            raise NotFound(f"{self._where}: not found") from value
        if isinstance(value, (AlreadyExistsError, FileExistsError)):
            raise AlreadyExists(f"{self._where}: already exists") from value
        if isinstance(value, (BaseError, OSError, ValueError)):
            raise StoreError(f"{self._where}: {_first_line(value)}") from value


def _first_line(error: BaseException) -> str:
    text = Exception.__str__(error) if isinstance(error, Exception) else str(error)
    return text.splitlines()[0] if text else type(error).__name__


def is_local(uri: str) -> bool:
    """Return whether `uri` names a folder of this machine."""
    return not re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+://", uri) or uri.startswith("file://")


def to_local_path(uri: str) -> Path:
    """Return the folder that a local `uri` names."""
    return Path(uri.removeprefix("file://"))


def open_store(uri: str, *, create: bool = False) -> Store:
    """Return the store at `uri`; with `create` a local folder is made if it is missing.

    Raises:
        NotFound: a local folder is not there.
        StoreError: the URI is not understood, or the folder cannot be made.
    """
    if uri.startswith("memory://"):
        inner: Any = _memory_stores.get(uri)
        if inner is None:
            inner = _memory_stores[uri] = MemoryStore()
        return Store(uri, inner)
    if is_local(uri):
        path = to_local_path(uri).absolute()
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path}: is a file, a store is a folder or bucket. Choose another place")
        if not create and not path.is_dir():
            raise NotFound(f"{path}: no such folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            return Store(str(path), LocalStore(path))
        except (OSError, BaseError) as error:
            raise StoreError(f"{path}: cannot be made ({_first_line(error)}). Choose another 'output' or grant write access") from error
    try:
        return Store(uri, _from_url(uri, client_options=_CLIENT_OPTIONS, retry_config=_RETRY_CONFIG))
    except (BaseError, ValueError) as error:
        raise StoreError(f"{uri}: cannot be opened ({_first_line(error)})") from error
