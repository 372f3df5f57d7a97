"""Block reader: the bytes of base and experts, block by block, for the kernels.

Local files are read into buffers small enough to stay in the processor's caches
(manifests/stores/local_file.py). Remote objects are prefetched (manifests/stores/prefetch.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from mmerge.manifests.errors import StoreError, StoreUnavailable
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.stores.local_file import LocalFile
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.input_digests import BlockDigests
from mmerge.workers.checkpoints.reading import read_source
from mmerge.workers.checkpoints.sources import FormedSource, OpenStores, TensorSource
from mmerge.workers.kernels.tiles import CODES

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class InputBlock:
    """The same entries of several sources; the next block reuses their memory."""

    start: int
    stop: int
    rows: Sequence[Bytes]
    """Bytes of each source in a dtype of the kernels; may be longer than the entries."""
    codes: NDArray[np.int64]
    """Kernel code of the dtype of each row."""
    raw: tuple[memoryview, ...]
    """Bytes of each source as they are stored."""

    @property
    def num_entries(self) -> int:
        """Entries of the block."""
        return self.stop - self.start

    @cached_property
    def addresses(self) -> NDArray[np.int64]:
        """Memory address of each row, for the kernels."""
        return np.array([row.__array_interface__["data"][0] for row in self.rows], np.int64)

    def at(self, start: int) -> InputBlock:
        """Return the block from `start` on of equal length, read into the same memory."""
        block = InputBlock(start, start + self.num_entries, self.rows, self.codes, self.raw)
        vars(block)["addresses"] = self.addresses
        return block

    def of_expert(self, index: int) -> InputBlock:
        """Return the block of the base (the first source) and one expert."""
        which = [0, index + 1]
        rows, raw = (self.rows[0], self.rows[index + 1]), (self.raw[0], self.raw[index + 1])
        return InputBlock(self.start, self.stop, rows, self.codes[which], raw)


class InputReader:
    """Reads tensors of several checkpoints. Files stay open until it closes. Not thread-safe."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, str], LocalFile] = {}
        self._stores = OpenStores()
        self._rooms: dict[str, Bytes] = {}

    def __enter__(self) -> InputReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def blocks(
        self,
        sources: Sequence[TensorSource],
        *,
        block_entries: int,
        digests: BlockDigests | None = None,
    ) -> Iterator[InputBlock]:
        """Yield the blocks of several sources in order.

        Args:
            sources: of equally many entries.
            block_entries: a multiple of the kernels' tile.
            digests: of the sources, for this pass alone; checked before the last block is yielded,
                so that what is computed from a whole matrix begins with the right one.

        Raises:
            InputChanged: the bytes are not those that `digests` expects.
            StoreError: a file is missing, shorter than its header says, or cannot be read.
        """
        for block in self._read_blocks(sources, block_entries=block_entries):
            if digests is not None:
                digests.update(block.raw)
                if block.stop == sources[0].spec.num_entries:
                    digests.check()
            yield block

    def _read_blocks(
        self, sources: Sequence[TensorSource], *, block_entries: int
    ) -> Iterator[InputBlock]:
        num_entries = sources[0].spec.num_entries
        step = max(min(block_entries, num_entries), 1)
        dtypes = [source.spec.dtype for source in sources]
        codes = np.array([CODES.get(dtype, 0) for dtype in dtypes], np.int64)
        streams = [self._open_named(source) for source in sources]
        keeps_memory = all(
            stream.needs_room and dtype in CODES
            for stream, dtype in zip(streams, dtypes, strict=True)
        )
        block: InputBlock | None = None
        for start in range(0, num_entries, step):
            stop = min(start + step, num_entries)
            if block is not None and keeps_memory and stop - start == block.num_entries:
                for source, stream, row in zip(sources, streams, block.rows, strict=True):
                    _read_named(source, stream, len(row), row)
                block = block.at(start)
                yield block
                continue
            stored = []
            for index, (source, stream) in enumerate(zip(sources, streams, strict=True)):
                num_bytes = (stop - start) * DTYPE_BYTES[dtypes[index]]
                room = self._room(f"read {index}", num_bytes, stream)
                data = _read_named(source, stream, num_bytes, room)
                if not stream.needs_room:
                    data = self._align(data, dtypes[index], index)
                stored.append(data)
            rows = [
                self._widen(data, dtype, index)
                for index, (data, dtype) in enumerate(zip(stored, dtypes, strict=True))
            ]
            block = InputBlock(start, stop, rows, codes, tuple(data.data for data in stored))
            yield block

    def _room(self, name: str, num_bytes: int, stream: _Stream | None = None) -> Bytes:
        """Return a reusable buffer that starts at a cache line; empty for a stream with its own."""
        if stream is not None and not stream.needs_room:
            return _NO_ROOM
        if len(self._rooms.get(name, _NO_ROOM)) < num_bytes:
            self._rooms.pop(name, None)
            room = np.empty(num_bytes + 64, np.uint8)
            self._rooms[name] = room[-room.ctypes.data % 64 :]
        return self._rooms[name][:num_bytes]

    def _align(self, data: Bytes, dtype: str, index: int) -> Bytes:
        """Return bytes that start at a whole entry; a header may leave data at any offset."""
        if data.__array_interface__["data"][0] % DTYPE_BYTES[dtype] == 0:
            return data
        room = self._room(f"aligned {index}", len(data))
        room[:] = data
        return room

    def _widen(self, data: Bytes, dtype: str, index: int) -> Bytes:
        if dtype in CODES:
            return data
        room = self._room(f"widened {index}", len(data) // DTYPE_BYTES[dtype] * 4)
        _widen_by_torch(data.data, dtype, room)
        return room

    def _open_named(self, source: TensorSource) -> _Stream:
        try:
            return self._open(source)
        except StoreUnavailable:
            raise  # the task is tried again
        except StoreError as error:
            raise _name_tensor(error, source) from error

    def _open(self, source: TensorSource) -> _Stream:
        if isinstance(source, FormedSource):
            return _SourceStream(self._stores, source)
        store = self._stores.get(source.uri)
        if store is None:
            store = self._stores[source.uri] = open_readable_store(source.uri)
        key = (source.uri, source.file)
        if key not in self._files:
            file = store.open_local_file(source.file)
            if file is None:
                return _SourceStream(self._stores, source)
            file.advise_sequential()
            self._files[key] = file
        return _LocalStream(self._files[key], source)


_NO_ROOM: Bytes = np.empty(0, np.uint8)


class _Stream(Protocol):
    """The bytes of one tensor, read once in order."""

    needs_room: bool
    """Whether `read` fills `room`; otherwise it returns memory of its own."""

    def read(self, num_bytes: int, room: Bytes) -> Bytes:
        """Return the next bytes, valid until the next call."""


class _LocalStream(_Stream):
    needs_room = True

    def __init__(self, file: LocalFile, source: TensorSource) -> None:
        self._file = file
        self._position = source.spec.offset

    @override
    def read(self, num_bytes: int, room: Bytes) -> Bytes:
        self._file.read_into(room, offset=self._position)
        self._position += num_bytes
        return room


class _SourceStream(_Stream):
    """Prefetched bytes of a remote object, or weights computed from several stored tensors."""

    needs_room = False

    def __init__(self, stores: OpenStores, source: TensorSource) -> None:
        self._stores, self._source, self._position = stores, source, 0

    @override
    def read(self, num_bytes: int, room: Bytes) -> Bytes:
        data = read_source(
            self._source, stores=self._stores, offset=self._position, num_bytes=num_bytes
        )
        self._position += num_bytes
        return np.frombuffer(data, np.uint8)


def _read_named(source: TensorSource, stream: _Stream, num_bytes: int, room: Bytes) -> Bytes:
    # No context manager: one per block and source took 3 % of a scan.
    try:
        return stream.read(num_bytes, room)
    except StoreUnavailable:
        raise  # the task is tried again
    except StoreError as error:
        raise _name_tensor(error, source) from error


def _name_tensor(error: StoreError, source: TensorSource) -> StoreError:
    """Return an error that ends a task, with the tensor that was read."""
    return type(error)(
        f"{Exception.__str__(error)}, while {source.spec.name} was read: the file was removed,"
        " cut short or locked after its header was read. Put it back, and run again"
    )


def _widen_by_torch(data: memoryview, dtype: str, row: NDArray[np.uint8]) -> None:
    import torch

    from mmerge.workers.checkpoints.dtypes import TORCH_DTYPES

    if dtype.startswith(("F", "BF")):
        values = (
            torch.frombuffer(data, dtype=torch.uint8).view(TORCH_DTYPES[dtype]).to(torch.float32)
        )
        row[: values.numel() * 4] = values.view(torch.uint8).numpy()
