"""A store in a local folder: writes that survive a power failure, and names that cannot lead out of
the folder.

The library writes to a temporary name and renames, but does not wait for the disk; here a name
appears only when the bytes under it are on the disk. Who writes need not wait for that: `settle`
may do it elsewhere, while the next file is made.
"""

from __future__ import annotations

import errno
import mmap
import os
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmerge.manifests.errors import AlreadyExists, StoreError

PARTIAL_SUFFIX = ".partial"
"""Ending of a file that is being written; its name begins with a dot. No key has such a name."""
BUFFER_BYTES = 4 << 20
"""Bytes that go to the disk at once."""
NUM_BUFFERS = 4
"""Buffers of a writer: one is filled while the others are on their way, so that a disk that pauses
stops nobody at once.
"""
WRITING_THREADS = 4
_free_buffers: deque[mmap.mmap] = deque(maxlen=NUM_BUFFERS)
"""Buffers of writers that are done, for the next one: memory that is touched for the first time
costs more than the copy into it.
"""


def is_partial(name: str) -> bool:
    """Return whether the last part of a key is the temporary name of a file being written."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(PARTIAL_SUFFIX)


@dataclass(frozen=True)
class Pending:
    """A file that is written, but perhaps not on the disk yet, and has no name."""

    key: str
    """The name that it gets."""
    partial: str
    """Its temporary name, in the same folder."""


class Folder:
    """The folder of a local store."""

    def __init__(self, path: Path) -> None:
        """Open the folder at `path`, which exists."""
        self.path = path
        self._roots = [path.resolve()]
        if path.parent.name == "snapshots":
            # The layout of the Hugging Face cache: snapshots/REVISION/file is a link to
            # ../../blobs/DIGEST.
            self._roots.append((path.parent.parent / "blobs").resolve())
        self._inside: dict[str, Path] = {}
        """Paths that were found to stay inside, by key."""
        self.pending: list[Pending] | None = None
        """Where writers leave what is to be settled later, in their order; None where each one
        waits for the disk itself.
        """

    def place(self, key: str) -> Path:
        """Return the path of a key. Raises StoreError when a link on the way leads out of the
        folder.
        """
        path = self._inside.get(key)
        if path is None:
            path = self.path / key
            real = Path(os.path.realpath(path))
            if not any(real == root or root in real.parents for root in self._roots):
                raise StoreError(
                    f"{self.path}: {key} is a link that leads out of the folder, to {real}. Put a"
                    " copy there instead"
                )
            self._inside[key] = path
        return path

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Create or replace a file in one step, on the disk when this returns."""
        with FolderWriter(self, key) as out:
            out.write(data)

    def put_new(self, key: str, data: bytes | memoryview) -> None:
        """Create a file in one step, on the disk when this returns. Raises AlreadyExists."""
        with FolderWriter(self, key, replace=False) as out:
            out.write(data)

    def settle(self, pending: Pending) -> None:
        """Give a pending file its name, once its bytes are on the disk. Raises OSError, and then
        the file is gone.
        """
        target = self.place(pending.key)
        partial = target.with_name(pending.partial)
        try:
            _sync(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folders(target.parent, self.path)

    def forget(self, pending: Pending) -> None:
        """Delete a pending file."""
        self.place(pending.key).with_name(pending.partial).unlink(missing_ok=True)

    def iterate_keys(self, prefix: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yield the key and status of every file below a folder; links to folders are not followed."""
        start = self.place(prefix) if prefix else self.path
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder) / name
                with suppress(FileNotFoundError):
                    yield path.relative_to(self.path).as_posix(), path.stat()


class FolderWriter:
    """Streams one file under a temporary name, which becomes its name when the bytes are on the
    disk.

    Whole buffers go to the disk past the page cache, behind the caller's back, where the file
    system allows that: a composite is written once and read elsewhere, and its pages would only
    push out those of the inputs.
    """

    def __init__(self, folder: Folder, key: str, *, replace: bool = True) -> None:
        self._key, self._replace, self._root = key, replace, folder.path
        self._pending = folder.pending if replace else None
        self._target = folder.place(key)
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self._target.with_name(
            f".{self._target.name[:80]}.{secrets.token_hex(6)}{PARTIAL_SUFFIX}"
        )
        self._descriptor = os.open(
            self._partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666
        )
        self._direct: int | None = None
        self._buffers: deque[mmap.mmap] = deque()
        """The first is being filled."""
        self._filled = 0
        self._position = 0
        """Where in the file the current buffer begins."""
        self._flushing: deque[Future[None]] = deque()

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`; its memory may be used again when this returns."""
        view = memoryview(data).cast("B")
        if not self._buffers:
            self._buffers.append(_take_buffer())
        while view:
            count = min(len(view), BUFFER_BYTES - self._filled)
            self._buffers[0][self._filled : self._filled + count] = view[:count]
            self._filled += count
            view = view[count:]
            if self._filled == BUFFER_BYTES:
                self._flush()

    def close(self) -> None:
        """Give the file its name, now or when it is settled. Raises AlreadyExists when it must not
        be replaced and is there.
        """
        try:
            self._wait(0)
            if self._filled:
                with memoryview(self._buffers[0]) as view:
                    _write_all(self._descriptor, view[: self._filled], self._position)
            if self._pending is None:
                os.fsync(self._descriptor)
        except OSError:
            self.abandon()
            raise
        self._close_files()
        if self._pending is not None:
            self._pending.append(Pending(self._key, self._partial.name))
            return
        try:
            if self._replace:
                self._partial.replace(self._target)
            else:
                self._link()
        finally:
            self._partial.unlink(missing_ok=True)
        _sync_folders(self._target.parent, self._root)

    def _flush(self) -> None:
        """Hand the full buffer to a thread that writes, and go on with the next one."""
        if self._position == 0:
            self._direct = _open_direct(self._partial)
        self._flushing.append(
            _writing_threads().submit(self._write_buffer, self._buffers[0], self._position)
        )
        if len(self._buffers) < NUM_BUFFERS:
            self._buffers.appendleft(_take_buffer())
        else:
            self._wait(NUM_BUFFERS - 1)
            self._buffers.rotate(1)
        self._position += BUFFER_BYTES
        self._filled = 0

    def _write_buffer(self, buffer: mmap.mmap, position: int) -> None:
        with memoryview(buffer) as view:
            if self._direct is not None:
                try:
                    _write_all(self._direct, view, position)
                    return
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            # The file system opens files so, but does not write them so.
            _write_all(self._descriptor, view, position)

    def _wait(self, num_left: int) -> None:
        """Wait until no more than so many buffers are on their way."""
        while len(self._flushing) > num_left:
            self._flushing.popleft().result()

    def _close_files(self) -> None:
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)
        _free_buffers.extend(self._buffers)
        self._buffers.clear()

    def _link(self) -> None:
        try:
            os.link(self._partial, self._target)
        except FileExistsError:
            raise AlreadyExists(f"{self._root}: {self._key}: already exists") from None
        except OSError:
            # A file system without hard links: O_EXCL makes the name, the rename its content.
            try:
                os.close(os.open(self._target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                raise AlreadyExists(f"{self._root}: {self._key}: already exists") from None
            self._partial.replace(self._target)

    def abandon(self) -> None:
        """Forget what was written."""
        while self._flushing:
            with suppress(OSError):
                self._wait(0)
        self._close_files()
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


@cache
def _writing_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(WRITING_THREADS, thread_name_prefix="write")


def _take_buffer() -> mmap.mmap:
    """Return memory that begins at a page, as writing past the page cache asks for; private, since
    shared memory is a file of its own.
    """
    with suppress(IndexError):
        return _free_buffers.pop()
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, BUFFER_BYTES)


def _open_direct(path: Path) -> int | None:
    """Return a descriptor that writes past the page cache, None where the system or the file system
    has none.
    """
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _sync_folders(folder: Path, root: Path) -> None:
    """Put the names in a folder, and the folder's own name, on the disk."""
    for path in (folder, *folder.parents):
        with suppress(OSError):  # some file systems cannot sync a folder
            _sync(path)
        if path == root:
            return


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
