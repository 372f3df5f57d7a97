"""The reading of local files, for local stores and for the workers' inputs alike.

Files are read by `preadv` into memory that the caller names or that stays in the caches. Mapping
them costs more, measured for stores and for inputs: bringing pages into a map and out of it takes
as long as the copy, and a digest reads what was just copied from a cache.

There is one readahead rule: who reads a file from front to back says so, and the kernel's readahead
does the rest. To request windows of 4 or 16 MiB before they are read (WILLNEED) was 0.6 to 1.1
times as fast, measured on files that were not cached, with one stream and with four in step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.regular_file import describe_os_error, open_descriptor
from mmerge.manifests.stores.buffers import BufferPool

_block_buffers = BufferPool(max_free=64)
"""One per concurrent reader; the bound only limits what a burst of readers leaves behind."""


class LocalFile:
    """A local file that is open for reading at any position. Thread-safe."""

    def __init__(self, path: Path, *, name: str) -> None:
        """Open the file at `path`; errors begin with `name`.

        Raises:
            NotFound: there is no such file, or it is a folder.
            StoreError: it cannot be opened, or is no regular file.
        """
        self.name = name
        try:
            self._descriptor = open_descriptor(path)
        except IsADirectoryError as error:
            raise NotFound(f"{name}: not found, it is a folder") from error
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{name}: not found") from error
        except OSError as error:
            raise StoreError(f"{name}: {describe_os_error(error)}") from error
        self.num_bytes = os.fstat(self._descriptor).st_size
        """Size of the file when it was opened, in bytes."""

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def read(self, *, offset: int, num_bytes: int) -> memoryview:
        """Return `num_bytes` bytes from `offset`. Raises StoreError if the file is shorter."""
        self.check_range(offset, num_bytes)
        block = np.empty(num_bytes, np.uint8)
        self.read_into(block, offset=offset)
        return block.data.toreadonly()

    def read_into(self, block: NDArray[np.uint8], *, offset: int) -> None:
        """Fill `block`, uint8, with the bytes from `offset` on.

        Raises:
            StoreError: the file ends before, or cannot be read.
        """
        view = block.data
        position = offset
        while view:
            try:
                count = self._read_some(view, position)
            except OSError as error:
                raise StoreError(f"{self.name}: {error.strerror}") from error
            if not count:
                raise StoreError(
                    f"{self.name}: bytes {offset} to {offset + len(block)} were requested, it ends"
                    f" at {position}"
                )
            view = view[count:]
            position += count

    def _read_some(self, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [view], offset)
        data = os.pread(self._descriptor, view.nbytes, offset)
        view[: len(data)] = data
        return len(data)

    def check_range(self, offset: int, num_bytes: int) -> None:
        """Raise StoreError if the file was too short for a range when it was opened."""
        if self.num_bytes < offset + num_bytes:
            raise StoreError(
                f"{self.name}: bytes {offset} to {offset + num_bytes} were requested, it ends at"
                f" {self.num_bytes}"
            )

    def advise_sequential(self) -> None:
        """Tell the kernel that the file is read from front to back."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError):  # some file systems take no advice
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)


def read_blocks_of(
    file: LocalFile,
    *,
    offset: int,
    num_bytes: int,
    block_bytes: int,
    into: NDArray[np.uint8] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Yield a range of a file in blocks of `block_bytes` bytes; the last may be shorter.

    With `into`, uint8 [num_bytes], the blocks are consecutive slices of it and stay valid;
    otherwise a block is valid until the next one.

    Raises:
        StoreError: the file is shorter (then nothing was read), or cannot be read.
    """
    file.check_range(offset, num_bytes)
    file.advise_sequential()
    if into is not None:
        for start in range(0, num_bytes, block_bytes):
            block = into[start : min(start + block_bytes, num_bytes)]
            file.read_into(block, offset=offset + start)
            yield block
        return
    buffer = _block_buffers.acquire(min(block_bytes, num_bytes))
    try:
        for start in range(0, num_bytes, block_bytes):
            block = buffer[: min(block_bytes, num_bytes - start)]
            file.read_into(block, offset=offset + start)
            yield block
    finally:
        _block_buffers.release(buffer)
