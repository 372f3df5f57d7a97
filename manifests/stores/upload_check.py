"""MD5 digests of an upload, in the form that S3 servers return as entity tag of an object.

The entity tag of an object that was sent in one request is the MD5 of its bytes; that of a
multipart upload is the MD5 of the MD5s of its parts, and `-N`. Servers that encrypt with keys of
their own, Google and Azure return other tags, which say nothing about the bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from mmerge.manifests.stores.writer import WRITER_BUFFER_BYTES

UPLOAD_PART_BYTES = WRITER_BUFFER_BYTES
"""Every part of a multipart upload but the last one has this size."""


class UploadDigests:
    """MD5 digests of the parts of an upload, updated as its bytes are sent."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._parts: list[bytes] = []
        """Of the complete parts."""
        self._part = _make_md5()
        self._part_bytes = 0

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        view = memoryview(data)
        self.num_bytes += len(view)
        while view:
            count = min(len(view), UPLOAD_PART_BYTES - self._part_bytes)
            self._part.update(view[:count])
            self._part_bytes += count
            view = view[count:]
            if self._part_bytes == UPLOAD_PART_BYTES:
                self._parts.append(self._part.digest())
                self._part = _make_md5()
                self._part_bytes = 0

    def matches(self, entity_tag: str) -> bool:
        """Return whether this is the entity tag of exactly these bytes, of one or more parts."""
        parts = self._all_parts()
        tags = {f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"}
        if len(parts) == 1:
            tags.add(parts[0].hex())
        return entity_tag.strip('"') in tags

    def parts(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield offset, size (bytes) and MD5 of each part."""
        for index, digest in enumerate(self._all_parts()):
            offset = index * UPLOAD_PART_BYTES
            yield offset, min(UPLOAD_PART_BYTES, self.num_bytes - offset), digest

    def _all_parts(self) -> list[bytes]:
        if self._part_bytes or not self._parts:
            return [*self._parts, self._part.digest()]
        return self._parts


def is_md5_tag(entity_tag: str) -> bool:
    """Return whether an entity tag has the form of an MD5, so that it may be one."""
    return re.fullmatch(r'"?[0-9a-f]{32}(-[0-9]+)?"?', entity_tag) is not None


def digest_part(data: bytes | memoryview) -> bytes:
    """Return the MD5 of the bytes of one part."""
    return hashlib.md5(data, usedforsecurity=False).digest()


def _make_md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
