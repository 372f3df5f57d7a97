"""Objects are streamed to the store and hashed incrementally."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from blake3 import blake3

WRITER_BUFFER_BYTES = 8 << 20
"""Bytes that the streaming writer of an object store holds before it sends a part."""
WRITER_CONCURRENCY = 4
"""Parts of one object that are sent at once."""


class ObjectSink(Protocol):
    """Receives the bytes of one object.

    Call order, all by one `ObjectWriter`:
        1. `write`, any number of times.
        2. `commit` after success, or `abort` after an error; nothing after that.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`; the caller may reuse its memory when this returns."""

    def commit(self) -> None:
        """Make the object visible under its key, replacing any earlier one."""

    def abort(self) -> None:
        """Discard what was written; nothing becomes visible."""


class BufferedSink:
    """A sink for stores that put whole objects: it collects the bytes, and puts them at the end."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        """Make a sink that calls `put` with all bytes on `commit`."""
        self._put = put
        self._data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        self._data += data

    def commit(self) -> None:
        """Put the object."""
        self._put(bytes(self._data))

    def abort(self) -> None:
        """Discard the bytes."""
        self._data.clear()


class DiscardingSink:
    """A sink that stores nothing: its writer only counts and hashes."""

    def write(self, data: bytes | memoryview) -> None:
        """Discard `data`."""

    def commit(self) -> None:
        """Do nothing."""

    def abort(self) -> None:
        """Do nothing."""


class ObjectWriter:
    """Streams one object to a sink, and counts and hashes its bytes on the way."""

    def __init__(self, key: str, sink: ObjectSink) -> None:
        self.key = key
        self.num_bytes = 0
        self._sink = sink
        self._digest = blake3()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, one byte per item. The caller may reuse its memory."""
        self._digest.update(data)
        self.num_bytes += len(data)
        self._sink.write(data)

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
        if kind is None:
            self._sink.commit()
        else:
            self._sink.abort()
