"""Object storage (`s3://`, `gs://`, `az://`) through the obstore library."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import NotFoundError
from typing_extensions import Self, override

from mmerge.manifests.errors import NotFound, StoreUnavailable
from mmerge.manifests.stores.base import MAX_READ_BYTES, Listed, OnPart, Store, check_key
from mmerge.manifests.stores.clients import make_client, read_endpoint, read_limits
from mmerge.manifests.stores.error_translation import translate_errors
from mmerge.manifests.stores.prefetch import (
    CHUNK_BYTES,
    PART_BYTES,
    PREFETCH_BYTES,
    ForwardReader,
    read_in_parts,
)
from mmerge.manifests.stores.upload_check import (
    UPLOAD_PART_BYTES,
    UploadDigests,
    digest_part,
    is_md5_tag,
)
from mmerge.manifests.stores.writer import WRITER_BUFFER_BYTES, WRITER_CONCURRENCY

COALESCE_BYTES = 1 << 20
"""Ranges that are nearer to each other than this are read in one request."""
CHECKED_BYTES = 64 << 20
"""Before a larger range is read, the object's size is requested: no memory for missing bytes."""
ATTEMPTS = 3
"""How often an operation is started. The library retries requests, but not interrupted bodies."""

_Result = TypeVar("_Result")


class ObjectStore(Store):
    """A prefix of a bucket."""

    is_remote = True
    prefetch_bytes = PREFETCH_BYTES

    def __init__(self, uri: str, client: Any) -> None:
        """Make a store of `client`, a store of the obstore library."""
        self.uri = uri
        self.client = client
        self._forward_readers: dict[str, ForwardReader] = {}
        self._has_other_tags = False
        """Whether an entity tag in the form of an MD5 was found to be none (encrypted buckets)."""

    @classmethod
    @override
    def open(cls, uri: str, *, create: bool) -> Self:
        return cls(uri.rstrip("/"), make_client(uri))

    @property
    @override
    def backend(self) -> str:
        scheme = self.uri.partition("://")[0]
        return f"{scheme} {read_endpoint(scheme)}".strip()

    @override
    def num_bytes(self, key: str) -> int:
        return int(self._head(key)["size"])

    @override
    def identity(self, key: str) -> str:
        meta = self._head(key)
        return f"{meta['size']}:{meta['e_tag'] or ''}:{meta['last_modified'].isoformat()}"

    def _head(self, key: str) -> Any:
        return self._retry(key, lambda: obstore.head(self.client, key))

    @override
    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        def read_whole() -> bytes:
            response = obstore.get(self.client, key)
            num_bytes = int(response.meta["size"])
            self.check_read_size(key, num_bytes, max_bytes=max_bytes)
            data = bytes(response.bytes())
            self._check_received(key, len(data), expected=num_bytes)
            return data

        return self._retry(key, read_whole)

    @override
    def read_start(self, key: str, *, num_bytes: int) -> tuple[memoryview, int]:
        def read_once() -> tuple[memoryview, int]:
            response = obstore.get(self.client, key, options={"range": (0, num_bytes)})
            object_bytes = int(response.meta["size"])
            data = memoryview(response.bytes())
            self._check_received(key, len(data), expected=min(num_bytes, object_bytes))
            return data, object_bytes

        return self._retry(key, read_once)

    @override
    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        check_key(key)
        if num_bytes == 0:
            return memoryview(b"")
        if num_bytes <= PART_BYTES:
            data = self._read_small_range(key, offset, num_bytes)
            on_part(data)
            return data
        if num_bytes > CHECKED_BYTES:
            end = self.num_bytes(key)
            self.check_range_end(key, offset=offset, num_bytes=num_bytes, end=end)
        return read_in_parts(
            lambda start, part: self._read_into(key, start, part),
            offset,
            num_bytes,
            on_part=on_part,
        )

    @override
    def read_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        check_key(key)
        if not ranges:
            return []
        starts = [offset for offset, _ in ranges]
        lengths = [num_bytes for _, num_bytes in ranges]

        def read_all() -> list[memoryview]:
            buffers = obstore.get_ranges(
                self.client, key, starts=starts, lengths=lengths, coalesce=COALESCE_BYTES
            )
            parts = [memoryview(buffer) for buffer in buffers]
            for part, (offset, num_bytes) in zip(parts, ranges, strict=True):
                end = offset + len(part)
                self.check_range_end(key, offset=offset, num_bytes=num_bytes, end=end)
            return parts

        return self._retry(key, read_all)

    @override
    def read_forward(
        self, key: str, *, offset: int, num_bytes: int, start: int, stop: int
    ) -> memoryview:
        check_key(key)
        if num_bytes == 0:
            return memoryview(b"")
        reader = self._forward_readers.get(key)
        if reader is None or (reader.start, reader.stop) != (start, stop):
            if reader is not None:
                reader.close()
            reader = ForwardReader(
                lambda begin, size: self._read_part(key, begin, size), start=start, stop=stop
            )
            self._forward_readers[key] = reader
        data = reader.read(offset, num_bytes)
        if offset + num_bytes >= stop:
            del self._forward_readers[key]
        return data

    def _read_small_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        def read_once() -> memoryview:
            buffer = obstore.get_range(self.client, key, start=offset, length=num_bytes)
            data = memoryview(buffer)
            end = offset + len(data)
            self.check_range_end(key, offset=offset, num_bytes=num_bytes, end=end)
            return data

        return self._retry(key, read_once)

    def _read_part(self, key: str, offset: int, num_bytes: int) -> memoryview:
        part = np.empty(num_bytes, np.uint8)
        self._read_into(key, offset, part)
        return part.data.toreadonly()

    def _read_into(self, key: str, offset: int, part: NDArray[np.uint8]) -> None:
        def read_once() -> None:
            byte_range = (offset, offset + len(part))
            response = obstore.get(self.client, key, options={"range": byte_range})
            received = 0
            for chunk in response.stream(min_chunk_size=CHUNK_BYTES):
                data = np.frombuffer(chunk, np.uint8)
                part[received : received + len(data)] = data
                received += len(data)
            end = offset + received
            self.check_range_end(key, offset=offset, num_bytes=len(part), end=end)

        self._retry(key, read_once)

    def _check_received(self, key: str, num_bytes: int, *, expected: int) -> None:
        if num_bytes != expected:
            raise StoreUnavailable(
                f"{self.uri}: {key}: {num_bytes:,} of {expected:,} bytes were received"
            )

    @override
    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        with translate_errors(self.uri, prefix):
            for batch in obstore.list(self.client, prefix=prefix or None):
                for meta in batch:
                    yield Listed(str(meta["path"]), int(meta["size"]), meta["last_modified"])

    @override
    def put_new(self, key: str, data: bytes) -> None:
        self._retry(
            key,
            lambda: obstore.put(self.client, key, data, mode="create", use_multipart=False),
        )

    @override
    def put(self, key: str, data: bytes) -> None:
        digests = UploadDigests()
        digests.update(data)

        def put_and_confirm() -> None:
            obstore.put(
                self.client,
                key,
                data,
                use_multipart=len(data) > UPLOAD_PART_BYTES,
                chunk_size=UPLOAD_PART_BYTES,
            )
            self.confirm_upload(key, digests)

        self._retry(key, put_and_confirm)

    @override
    def open_sink(self, key: str) -> ObjectStoreSink:
        return ObjectStoreSink(self, key)

    @override
    def delete(self, key: str) -> None:
        try:
            self._retry(key, lambda: obstore.delete(self.client, key))
        except NotFound:
            return

    def confirm_upload(self, key: str, digests: UploadDigests) -> None:
        """Compare what the server holds with what it was sent.

        An entity tag that is the MD5 of the bytes confirms them. Otherwise they are read back,
        unless the object is large and the server is known to return other tags: of such an object
        only the size is compared.

        Raises:
            StoreUnavailable: the server holds nothing, or other bytes.
        """
        where = f"{self.uri}: {key}"
        try:
            meta = obstore.head(self.client, key)
        except (NotFoundError, FileNotFoundError) as error:
            raise StoreUnavailable(
                f"{where}: the server reported success, but has no such object"
            ) from error
        if int(meta["size"]) != digests.num_bytes:
            raise StoreUnavailable(
                f"{where}: {digests.num_bytes:,} bytes were written, the server has"
                f" {meta['size']:,}"
            )
        entity_tag = str(meta["e_tag"] or "")
        if digests.matches(entity_tag):
            return
        may_be_md5 = is_md5_tag(entity_tag) and not self._has_other_tags
        if digests.num_bytes > UPLOAD_PART_BYTES and not may_be_md5:
            return
        for offset, num_bytes, digest in digests.parts():
            data: bytes | memoryview
            if num_bytes == digests.num_bytes:
                data = self.read(key, max_bytes=num_bytes)
            else:
                data = self.read_range(key, offset=offset, num_bytes=num_bytes)
            if digest_part(data) != digest:
                raise StoreUnavailable(
                    f"{where}: the server stored other bytes than it was sent, from byte {offset}"
                    f" to {offset + num_bytes}"
                )
        self._has_other_tags |= may_be_md5

    def _retry(self, key: str, operation: Callable[[], _Result]) -> _Result:
        """Return the result of `operation`; start again where a connection broke, within limits."""
        check_key(key)
        start = time.monotonic()
        for attempt in range(1, ATTEMPTS):
            try:
                with translate_errors(self.uri, key):
                    return operation()
            except StoreUnavailable:
                if time.monotonic() - start > read_limits().retry_seconds:
                    raise
                time.sleep(random.uniform(0.1, 0.5) * 2**attempt)
        with translate_errors(self.uri, key):
            return operation()


class ObjectStoreSink:
    """Streams one object as a multipart upload."""

    def __init__(self, store: ObjectStore, key: str) -> None:
        self._store, self._key = store, key
        self._digests = UploadDigests()
        with translate_errors(store.uri, key):
            self._upload: Any = obstore.open_writer(
                store.client,
                key,
                buffer_size=WRITER_BUFFER_BYTES,
                max_concurrency=WRITER_CONCURRENCY,
            )

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._digests.update(data)
        with translate_errors(self._store.uri, self._key):
            # The library keeps a reference until the part is sent, hence the copy.
            self._upload.write(bytes(data))

    def commit(self) -> None:
        """Complete the upload. Raises StoreUnavailable if the server holds other bytes."""
        with translate_errors(self._store.uri, self._key):
            self._upload.close()
            self._store.confirm_upload(self._key, self._digests)

    def abort(self) -> None:
        """Drop the upload; a bucket's lifecycle rule removes its parts (docs/storage.md)."""
        self._upload = None
