"""Local folders as stores: durable writes, and keys that cannot lead out of the folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

from typing_extensions import Self, override

from mmerge.manifests.errors import NotFound, StoreError, StoreUnavailable
from mmerge.manifests.regular_file import describe_os_error
from mmerge.manifests.stores.base import (
    MAX_READ_BYTES,
    DeferredCommit,
    Listed,
    OnPart,
    Store,
    check_key,
)
from mmerge.manifests.stores.local_file import LocalFile
from mmerge.manifests.stores.local_writer import (
    LocalWriter,
    create_durably,
    is_partial,
    replace_durably,
    sync_and_replace,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

LINK_ROOTS_VARIABLE = "MMERGE_LINK_ROOTS"
"""Environment variable: folders, separated as in PATH, into which links in a store may lead."""


class LocalStore(Store):
    """A local folder.

    Files are created by hard link, which lets exactly one of several writers succeed. Objects are
    not visible before their bytes are on the disk; within `defer_commits` they stay invisible until
    `commit`.
    """

    is_remote = False

    def __init__(self, path: Path) -> None:
        """Open the folder at `path`, which exists."""
        self.uri = str(path)
        self.path = path
        self._roots = [path.resolve()]
        if path.parent.name == "snapshots":
            # A snapshot in the Hugging Face cache: its files are links to ../../blobs/DIGEST.
            self._roots.append((path.parent.parent / "blobs").resolve())
        allowed = os.environ.get(LINK_ROOTS_VARIABLE, "")
        self._roots += [Path(root).resolve() for root in allowed.split(os.pathsep) if root]
        self._checked_paths: dict[str, Path] = {}
        """Paths that are known to stay inside the folder, by key."""
        self._deferred: list[DeferredCommit] | None = None
        """Collects the commits to defer; None where each write waits for the disk."""

    @classmethod
    @override
    def open(cls, uri: str, *, create: bool) -> Self:
        path = Path(uri[len("file://") :] if uri[:7].lower() == "file://" else uri).absolute()
        try:
            exists, is_folder = path.exists(), path.is_dir()
        except OSError as error:  # a name that is too long, links in a circle, no permission
            raise StoreError(f"{path}: {describe_os_error(error)}. Choose another path") from error
        if exists and not is_folder:
            raise StoreError(
                f"{path}: is a file, a store is a folder or bucket. Choose another place"
            )
        if not create and not is_folder:
            raise NotFound(f"{path}: no such folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be made ({error.strerror}). Choose another 'output' or grant write"
                " access"
            ) from error
        return cls(path)

    def to_path(self, key: str) -> Path:
        """Return the path of a key.

        Raises:
            StoreError: the key is not valid, or a link on the way leads out of the folder.
        """
        path = self._checked_paths.get(check_key(key))
        if path is None:
            path = self.path / key
            real = Path(os.path.realpath(path))
            if not any(real == root or root in real.parents for root in self._roots):
                raise StoreError(
                    f"{self.path}: {key} is a link that leads out of the folder, to {real}. Put a"
                    f" copy there instead, or allow links into a folder with {LINK_ROOTS_VARIABLE}"
                )
            self._checked_paths[key] = path
        return path

    @contextmanager
    def _os_errors_translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{self.uri}: {key}: not found") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise StoreError(f"{self.uri}: {key}: {reason}") from error

    @override
    def open_local_file(self, key: str) -> LocalFile:
        return LocalFile(self.to_path(key), name=f"{self.uri}: {key}")

    @override
    def read(self, key: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        with self.open_local_file(key) as file:
            self.check_read_size(key, file.num_bytes, max_bytes=max_bytes)
            return bytes(file.read(offset=0, num_bytes=file.num_bytes))

    @override
    def read_range(
        self, key: str, *, offset: int, num_bytes: int, on_part: OnPart = len
    ) -> memoryview:
        with self.open_local_file(key) as file:
            data = file.read(offset=offset, num_bytes=num_bytes)
        on_part(data)
        return data

    @override
    def num_bytes(self, key: str) -> int:
        return self._stat(key).st_size

    @override
    def identity(self, key: str) -> str:
        status = self._stat(key)
        # With the time of the last change of the status, which nobody can set: `cp -p` over a file
        # keeps its inode, and may keep size and time of modification.
        times = f"{status.st_mtime_ns // 1000:x}-{status.st_ctime_ns // 1000:x}"
        entity_tag = f'"{status.st_ino:x}-{times}-{status.st_size:x}"'
        return f"{status.st_size}:{entity_tag}:{_modified(status).isoformat()}"

    def _stat(self, key: str) -> os.stat_result:
        with self._os_errors_translated(key):
            status = self.to_path(key).stat()
        if stat.S_ISDIR(status.st_mode):
            raise NotFound(f"{self.uri}: {key}: not found, it is a folder")
        return status

    @override
    def list_objects(self, prefix: str = "") -> Iterator[Listed]:
        return (listed for listed in self._walk(prefix) if not is_partial(listed.key))

    @override
    def list_partials(self) -> Iterator[Listed]:
        return (listed for listed in self._walk("") if is_partial(listed.key))

    def _walk(self, prefix: str) -> Iterator[Listed]:
        """Yield every file below a folder; links to folders are not followed."""
        start = self.to_path(prefix) if prefix else self.path
        for folder, _, names in os.walk(start):
            for name in names:
                path = Path(folder) / name
                with suppress(FileNotFoundError):  # deleted meanwhile
                    status = path.stat()
                    key = path.relative_to(self.path).as_posix()
                    yield Listed(key, status.st_size, _modified(status))

    @override
    def put_new(self, key: str, data: bytes) -> None:
        with self._os_errors_translated(key):
            target = self.to_path(key)
            partial = _write_file(target, data, sync=True)
            self._check_partial(key, partial)
            create_durably(partial, target, root=self.path)

    @override
    def put(self, key: str, data: bytes) -> None:
        with self.open_writer(key) as out:
            out.write(data)

    @override
    def open_sink(self, key: str) -> LocalSink:
        return LocalSink(self, key)

    @override
    def delete(self, key: str) -> None:
        with self._os_errors_translated(key):
            self.to_path(key).unlink(missing_ok=True)

    @contextmanager
    @override
    def defer_commits(self) -> Iterator[list[DeferredCommit]]:
        deferred: list[DeferredCommit] = []
        self._deferred = deferred
        try:
            yield deferred
        except BaseException:
            self._discard(deferred)
            raise
        finally:
            self._deferred = None

    @override
    def commit(self, deferred: Sequence[DeferredCommit]) -> None:
        remaining = list(deferred)
        try:
            while remaining:
                self._commit_file(remaining.pop(0))
        finally:
            self._discard(remaining)

    def _commit_file(self, deferred: DeferredCommit) -> None:
        check_key(deferred.temporary_name)
        with self._os_errors_translated(deferred.key):
            target = self.to_path(deferred.key)
            partial = target.with_name(deferred.temporary_name)
            self._check_partial(deferred.key, partial)
            sync_and_replace(partial, target, root=self.path)

    def _check_partial(self, key: str, partial: Path) -> None:
        """Raise StoreUnavailable if garbage collection has deleted a file that was being written.

        It takes the file of a process that was suspended for long for that of a killed one.
        """
        if not partial.exists():
            raise StoreUnavailable(
                f"{self.uri}: {key}: its unfinished file {partial.name} was deleted, by garbage"
                " collection while this process was suspended, or by hand. Run again"
            )

    def _discard(self, deferred: Sequence[DeferredCommit]) -> None:
        for file in deferred:
            self.to_path(file.key).with_name(file.temporary_name).unlink(missing_ok=True)


class LocalSink:
    """Streams one object to a local store."""

    def __init__(self, store: LocalStore, key: str) -> None:
        self._store, self._key = store, key
        self._deferred = store._deferred
        with store._os_errors_translated(key):
            self._target = store.to_path(key)
            self._writer = LocalWriter(self._target)

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`."""
        with self._store._os_errors_translated(self._key):
            self._writer.write(data)

    def commit(self) -> None:
        """Give the file its name, or leave that to `LocalStore.commit`."""
        with self._store._os_errors_translated(self._key):
            self._writer.close(sync=self._deferred is None)
            self._store._check_partial(self._key, self._writer.partial)
            if self._deferred is None:
                replace_durably(self._writer.partial, self._target, root=self._store.path)
            else:
                self._deferred.append(DeferredCommit(self._key, self._writer.partial.name))

    def abort(self) -> None:
        """Delete the file."""
        self._writer.abort()


def _write_file(target: Path, data: bytes, *, sync: bool) -> Path:
    writer = LocalWriter(target)
    try:
        writer.write(data)
    except BaseException:
        writer.abort()
        raise
    writer.close(sync=sync)
    return writer.partial


def _modified(status: os.stat_result) -> datetime:
    # By integers: a float rounds the microseconds of today.
    return _EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)
