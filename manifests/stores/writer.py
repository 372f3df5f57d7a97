"""Writing one object as it is made: its bytes are counted and digested on their way."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

import obstore
from blake3 import blake3

from mmerge.manifests.errors import StoreUnavailable
from mmerge.manifests.stores.local import Folder, FolderWriter

if TYPE_CHECKING:
    from mmerge.manifests.stores.object_store import Store

WRITER_BUFFER_BYTES = 8 << 20
"""Bytes a streaming writer holds before it sends a part."""
WRITER_CONCURRENCY = 4
"""Parts that are on their way at once."""


class ObjectWriter:
    """Streams one object and counts and digests what passes through."""

    def __init__(self, store: Store, key: str, *, inner: Any, folder: Folder | None) -> None:
        """Begin an object of `store`, which is a folder, or what the library has opened (`inner`)."""
        self.key = key
        self.num_bytes = 0
        self._store = store
        self._is_folder = folder is not None
        self._digest = blake3()
        with store.translated(key):
            self._writer: Any = (
                FolderWriter(folder, key)
                if folder
                else obstore.open_writer(
                    inner, key, buffer_size=WRITER_BUFFER_BYTES, max_concurrency=WRITER_CONCURRENCY
                )
            )

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, one byte per item. The caller may use its buffer again."""
        self._digest.update(data)
        self.num_bytes += len(data)
        with self._store.translated(self.key):
            # The library keeps a reference until the part is sent; a folder has taken the bytes
            # when it returns.
            self._writer.write(data if self._is_folder else bytes(data))

    def hexdigest(self) -> str:
        """Return the BLAKE3 digest of everything written so far."""
        return str(self._digest.hexdigest())

    def __enter__(self) -> ObjectWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Closing commits. After an error the writer is dropped unclosed, so that no half object
        # gets a name.
        if kind is not None:
            if isinstance(self._writer, FolderWriter):
                self._writer.abandon()
            return
        with self._store.translated(self.key):
            self._writer.close()
        if self._store.is_remote and (found := self._store.num_bytes(self.key)) != self.num_bytes:
            raise StoreUnavailable(
                f"{self._store.uri}: {self.key}: {self.num_bytes:,} bytes were written, the server"
                f" keeps {found:,}"
            )
