"""The bytes of base and experts, block by block, into buffers that are used again: no copy but the one from the storage.

Local files are read by `preadv` straight into the rows that kernels work on; where the page cache lacks them, the system is
told to fetch ahead. What lies behind a network is fetched ahead of its use (manifests/ahead.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.manifests.errors import NotFound, StoreError
from mmerge.manifests.header import DTYPE_BYTES
from mmerge.manifests.store import check_key, is_local, open_store, to_local_path
from mmerge.workers.checkpoint import LowRankSource, OpenStores, TensorSource, read_source
from mmerge.workers.kernels import CODES

LOCAL_AHEAD_BYTES = 16 << 20
"""Bytes that the system is told to fetch when a local read finds them missing."""


@dataclass(frozen=True)
class InputBlock:
    """The same entries of several sources. The arrays are used again for the next block."""

    start: int
    stop: int
    rows: NDArray[np.uint8]
    """One row of bytes per source, in dtypes that kernels know; longer than needed."""
    codes: NDArray[np.int64]
    """The dtype of each row, as kernels name it."""
    raw: tuple[memoryview, ...]
    """The bytes of each source as they are stored."""

    @property
    def num_entries(self) -> int:
        """Entries of the block."""
        return self.stop - self.start

    def of_expert(self, index: int) -> InputBlock:
        """Return the block of the base, the first source, and of one expert alone."""
        which = [0, index + 1]
        return InputBlock(self.start, self.stop, self.rows[which], self.codes[which], (self.raw[0], self.raw[index + 1]))


class InputReader:
    """Reads tensors of several checkpoints; files stay open until it closes. One per task: it is not for several threads."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], int] = {}
        self._stores = OpenStores()
        self._buffer: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __enter__(self) -> InputReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def blocks(self, sources: Sequence[TensorSource], *, block_entries: int) -> Iterator[InputBlock]:
        """Yield the blocks of sources that have equally many entries, in order; `block_entries` is a multiple of whole tiles.

        Raises:
            NotFound, StoreError: a file is gone, or shorter than its header says.
        """
        num_entries = sources[0].spec.num_entries
        at_once = max(min(block_entries, num_entries), 1)
        widths = [DTYPE_BYTES[source.spec.dtype] for source in sources]
        is_known = [source.spec.dtype in CODES for source in sources]
        # Rows begin at whole cache lines; a dtype that kernels do not know is widened to float32 by torch.
        stride = -(-at_once * max([*widths, *(4 for known in is_known if not known)]) // 64) * 64
        rows = self._take(len(sources) * stride).reshape(len(sources), stride)
        codes = np.array([CODES.get(source.spec.dtype, 0) for source in sources], np.int64)
        streams = [self._open(source) for source in sources]
        spare = [None if known else np.empty(at_once * width, np.uint8) for known, width in zip(is_known, widths, strict=True)]
        targets = [rows[index] if target is None else target for index, target in enumerate(spare)]
        for start in range(0, num_entries, at_once):
            stop = min(start + at_once, num_entries)
            raw = []
            for index, (stream, width) in enumerate(zip(streams, widths, strict=True)):
                view = targets[index].data[: (stop - start) * width]
                stream.read_into(view)
                raw.append(view)
                if spare[index] is not None:
                    _widen_by_torch(view, sources[index].spec.dtype, rows[index])
            yield InputBlock(start, stop, rows, codes, tuple(raw))

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        if len(self._buffer) < num_bytes:
            self._buffer = np.empty(num_bytes + 64, np.uint8)
            self._buffer = self._buffer[-self._buffer.ctypes.data % 64 :]
        return self._buffer[:num_bytes]

    def _open(self, source: TensorSource) -> _Stream:
        if isinstance(source, LowRankSource):
            return _SourceStream(self._stores, source)
        store = self._stores.get(source.uri)
        if store is None:
            store = self._stores[source.uri] = open_store(source.uri)
        if not is_local(store.uri):
            return _SourceStream(self._stores, source)
        key = (source.uri, source.file)
        if key not in self._files:
            try:
                self._files[key] = os.open(to_local_path(store.uri) / check_key(source.file), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise NotFound(f"{store.uri}: {source.file}: not found") from error
            except OSError as error:
                raise StoreError(f"{store.uri}: {source.file}: {error.strerror}") from error
        return _LocalStream(self._files[key], Path(store.uri) / source.file, source)


class _Stream(Protocol):
    """The bytes of one tensor, from its first to its last."""

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""


class _LocalStream(_Stream):
    def __init__(self, descriptor: int, path: Path, source: TensorSource) -> None:
        self._descriptor, self._path = descriptor, path
        self._position = source.spec.offset
        self._end = source.spec.offset + source.spec.num_bytes
        self._advised = 0

    @override
    def read_into(self, view: memoryview) -> None:
        start = self._position
        while view.nbytes:
            try:
                count = self._read(view)
            except OSError as error:
                raise StoreError(f"{self._path}: {error.strerror}") from error
            if count == 0:
                raise StoreError(f"{self._path}: asked for bytes {start} to {self._position + view.nbytes}, it ends at {self._position}")
            view = view[count:]
            self._position += count

    def _read(self, view: memoryview) -> int:
        # What the page cache has comes without waiting; where it lacks something, all that follows is asked for at once.
        if hasattr(os, "RWF_NOWAIT"):
            with suppress(BlockingIOError, OSError):
                count = os.preadv(self._descriptor, [view], self._position, os.RWF_NOWAIT)
                if count:
                    return count
            if self._position + view.nbytes > self._advised:
                self._advised = min(self._position + LOCAL_AHEAD_BYTES, self._end)
                with suppress(OSError):
                    os.posix_fadvise(self._descriptor, self._position, self._advised - self._position, os.POSIX_FADV_WILLNEED)
        return os.preadv(self._descriptor, [view], self._position) if hasattr(os, "preadv") else self._read_plain(view)

    def _read_plain(self, view: memoryview) -> int:
        data = os.pread(self._descriptor, view.nbytes, self._position)
        view[: len(data)] = data
        return len(data)


class _SourceStream(_Stream):
    """Bytes that are fetched ahead over a network, or weights that lie in no file: a base's with a LoRA adapter."""

    def __init__(self, stores: OpenStores, source: TensorSource) -> None:
        self._stores, self._source, self._position = stores, source, 0

    @override
    def read_into(self, view: memoryview) -> None:
        view[:] = read_source(self._source, stores=self._stores, offset=self._position, num_bytes=view.nbytes)
        self._position += view.nbytes


def _widen_by_torch(data: memoryview, dtype: str, row: NDArray[np.uint8]) -> None:
    import torch

    from mmerge.workers.dtypes import TORCH_DTYPES

    if dtype.startswith(("F", "BF")):
        values = torch.frombuffer(data, dtype=torch.uint8).view(TORCH_DTYPES[dtype]).to(torch.float32)
        row[: values.numel() * 4] = values.view(torch.uint8).numpy()
