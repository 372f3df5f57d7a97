"""Tensor locations in files written by `torch.save`, without reading tensor bytes.

PyTorch's own loader, restricted to weights and run on fake tensors, gives names, shapes and
offsets. Nothing but tensors is unpickled. The bytes are then read by range, as in a safetensors
file.
"""

from __future__ import annotations

import io
import zipfile
from typing import Any, cast

import torch
from typing_extensions import override

from mmerge.manifests import limits
from mmerge.manifests.errors import CheckpointError, MmergeError, first_line
from mmerge.manifests.format.safetensors_header import TensorSpec
from mmerge.manifests.stores.base import ReadableStore
from mmerge.workers.checkpoints.dtypes import SAFETENSORS_DTYPES

_REMEDY = "Save it as safetensors (save_pretrained with safe_serialization=True)"


def read_pickled_specs(store: ReadableStore, file: str, *, where: str) -> dict[str, TensorSpec]:
    """Return dtype, shape and byte range of every tensor in a file that holds a dict of tensors.

    Args:
        store: where the file is.
        file: its key.
        where: names the file in errors.

    Raises:
        CheckpointError: the file holds anything but tensors by name, has the format that
            PyTorch wrote before 1.6, is compressed or big-endian, or one of its tensors is not
            contiguous.
    """
    from torch._subclasses.fake_tensor import (
        FakeTensorMode,  # takes longer to import than torch itself
    )

    try:
        opened: Any = _RangedFile(store, file)
        _check_archive(opened, where=f"{where}: the archive")
        with FakeTensorMode():
            loaded = torch.load(opened, weights_only=True)
    except MmergeError:
        raise
    except Exception as error:  # damaged pickles and archives raise anything
        reason = first_line(error)
        raise CheckpointError(
            f"{where}: cannot be read as a file of tensors ({reason[:200]}). {_REMEDY}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{where}: holds a {type(loaded).__name__}, not tensors by name. {_REMEDY}"
        )
    return {str(name): _to_spec(str(name), value, where=where) for name, value in loaded.items()}


def _check_archive(file: _RangedFile, *, where: str) -> None:
    """Refuse archives whose bytes are not those of the tensors.

    PyTorch never compresses, and reads compressed entries all the same; read by range, their bytes
    would be taken for weights, and they could unpack to any size.

    Raises:
        ValueError: an entry is compressed or there twice, or its numbers are not little-endian.
        CheckpointError: it has more entries, or a larger pickle, than the limits.
    """
    with zipfile.ZipFile(cast(Any, file)) as archive:
        entries = archive.infolist()
        limits.ARCHIVE_ENTRIES.check(len(entries), where=where, error=CheckpointError)
        for entry in entries:
            is_stored = entry.compress_type == zipfile.ZIP_STORED
            if not is_stored or entry.file_size != entry.compress_size:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.filename.endswith("data.pkl"):
                place = f"{where}: {entry.filename}"
                limits.SMALL_FILE_BYTES.check(entry.file_size, where=place, error=CheckpointError)
            if entry.filename.endswith("/byteorder") and entry.file_size > 16:
                raise ValueError("its byte order is unknown")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError("its numbers are not little-endian")
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("an entry is there twice")
    file.seek(0)


def _to_spec(name: str, value: object, *, where: str) -> TensorSpec:
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{where}: {name} is a {type(value).__name__}, not a tensor. {_REMEDY}"
        )
    dtype = SAFETENSORS_DTYPES.get(value.dtype)
    start = getattr(value.untyped_storage(), "_checkpoint_offset", None)
    if dtype is None or start is None or not value.is_contiguous():
        raise CheckpointError(
            f"{where}: {name} ({value.dtype}, strides {value.stride()}) cannot be read by byte"
            f" range. {_REMEDY}"
        )
    num_bytes = value.numel() * value.element_size()
    return TensorSpec(
        name,
        dtype,
        tuple(value.shape),
        int(start) + int(value.storage_offset()) * value.element_size(),
        num_bytes,
    )


class _RangedFile(io.RawIOBase):
    """A stored object as a seekable file, read by range."""

    def __init__(self, store: ReadableStore, file: str) -> None:
        self._store, self._file = store, file
        self._length = store.num_bytes(file)
        self._position = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._position

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    @override
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = min(len(buffer), max(0, self._length - self._position))
        buffer[:count] = self._store.read_range(self._file, offset=self._position, num_bytes=count)
        self._position += count
        return count
