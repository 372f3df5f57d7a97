"""Durable writes of local files: a name appears only when the bytes under it are on the disk.

The usual write to a temporary name and rename is not enough: after a power failure the name may be
there without its bytes. Here the file is synced before it is renamed, and its folder after.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmerge.manifests.errors import AlreadyExists
from mmerge.manifests.stores.buffers import BufferPool

PARTIAL_SUFFIX = ".partial"
"""Ending of the temporary name of a file being written; it begins with a dot. No key has one."""
BUFFER_BYTES = 4 << 20
"""Bytes that go to the disk at once."""
NUM_BUFFERS = 4
"""Buffers of a writer: one is filled while the others are written, so that a short pause of the
disk does not stop the caller.
"""
WRITING_THREADS = 4
_buffers = BufferPool(max_free=NUM_BUFFERS)


def is_partial(key: str) -> bool:
    """Return whether the last part of a key is the temporary name of a file being written."""
    name = key.rpartition("/")[2]
    return name.startswith(".") and name.endswith(PARTIAL_SUFFIX)


class LocalWriter:
    """Streams one file to a temporary name in the folder of its target.

    Whole buffers are written by a few threads, and past the page cache where the file system allows
    that: a build is written once and read elsewhere, and its pages would evict those of the inputs.
    """

    def __init__(self, target: Path) -> None:
        """Create the temporary file, and the folders above it. Raises OSError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        name = f".{target.name[:80]}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}"
        self.partial = target.with_name(name)
        self._descriptor = os.open(
            self.partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666
        )
        self._direct: int | None = None
        """A second descriptor of the file, which bypasses the page cache."""
        self._ring: deque[NDArray[np.uint8]] = deque()
        """The buffers; the first one is being filled."""
        self._filled = 0
        """Bytes in the first buffer."""
        self._position = 0
        """Where in the file the first buffer begins."""
        self._writes: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`; its memory may be reused when this returns. Raises OSError."""
        view = np.frombuffer(data, np.uint8)
        if not self._ring:
            self._ring.append(_buffers.acquire(BUFFER_BYTES))
        while len(view):
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._ring[0][self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def close(self, *, sync: bool) -> None:
        """Write what is left, and close; with `sync`, wait for the disk.

        Raises:
            OSError: the disk fails; the file is deleted.
        """
        try:
            self._wait(max_pending=0)
            if self._filled:
                _write_all(self._descriptor, self._ring[0][: self._filled].data, self._position)
            if sync:
                os.fsync(self._descriptor)
        except OSError:
            self.abort()
            raise
        self._release()

    def abort(self) -> None:
        """Delete the file."""
        while self._writes:
            with suppress(OSError):
                self._wait(max_pending=0)
        self._release()
        self.partial.unlink(missing_ok=True)

    def _flush(self) -> None:
        """Pass the full buffer to a writing thread, and continue with the next one."""
        if self._position == 0:
            self._direct = _open_direct(self.partial)
        write = _writing_threads().submit(self._write_buffer, self._ring[0], self._position)
        self._writes.append(write)
        if len(self._ring) < NUM_BUFFERS:
            self._ring.appendleft(_buffers.acquire(BUFFER_BYTES))
        else:
            # The oldest buffer is free once its write has ended.
            self._wait(max_pending=NUM_BUFFERS - 1)
            self._ring.rotate(1)
        self._position += BUFFER_BYTES
        self._filled = 0

    def _write_buffer(self, buffer: NDArray[np.uint8], position: int) -> None:
        view = buffer[:BUFFER_BYTES].data
        if self._direct is not None:
            try:
                _write_all(self._direct, view, position)
                return
            except OSError as error:
                # Some file systems open such files, but refuse to write them.
                if error.errno != errno.EINVAL:
                    raise
        _write_all(self._descriptor, view, position)

    def _wait(self, *, max_pending: int) -> None:
        while len(self._writes) > max_pending:
            self._writes.popleft().result()

    def _release(self) -> None:
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)
        while self._ring:
            _buffers.release(self._ring.pop())


def replace_durably(partial: Path, target: Path, *, root: Path) -> None:
    """Rename a synced file to `target`, and sync the folders up to `root`. Raises OSError."""
    try:
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folders(target.parent, root)


def sync_and_replace(partial: Path, target: Path, *, root: Path) -> None:
    """Wait until a file is on the disk, then do as `replace_durably`. Raises OSError."""
    try:
        _sync(partial)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    replace_durably(partial, target, root=root)


def create_durably(partial: Path, target: Path, *, root: Path) -> None:
    """Give a synced file the name `target`, which must be new, and sync the folders up to `root`.

    Raises:
        AlreadyExists: the name is taken; its file is unchanged.
        OSError: the file system fails.
    """
    message = f"{root}: {target.relative_to(root).as_posix()}: already exists"
    try:
        os.link(partial, target)
    except FileExistsError:
        raise AlreadyExists(message) from None
    except FileNotFoundError:
        # Garbage collection has deleted the file while this process was suspended.
        raise
    except OSError:
        # A file system without hard links: O_EXCL reserves the name, the rename fills it.
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:
            raise AlreadyExists(message) from None
        try:
            partial.replace(target)
        except OSError:
            target.unlink(missing_ok=True)  # ours, and empty
            raise
    finally:
        partial.unlink(missing_ok=True)
    _sync_folders(target.parent, root)


def _sync(path: Path) -> None:
    """Wait until the bytes of a file or the names of a folder are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folders(folder: Path, root: Path) -> None:
    for path in (folder, *folder.parents):
        with suppress(OSError):  # some file systems cannot sync a folder
            _sync(path)
        if path == root:
            return


@cache
def _writing_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WRITING_THREADS, thread_name_prefix="mmerge-write")


# A forked process has the pool but none of its threads: it would wait for them forever.
os.register_at_fork(after_in_child=_writing_threads.cache_clear)


def _open_direct(path: Path) -> int | None:
    """Return a descriptor that bypasses the page cache, None where that is not supported."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, position)
        view = view[count:]
        position += count
