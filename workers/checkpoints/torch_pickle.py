"""Tensor locations in files written by `torch.save`, without reading tensor bytes.

PyTorch's own loader, restricted to weights and run on fake tensors, gives names, shapes and
offsets. Nothing but tensors is unpickled. The bytes are then read by range, as in a safetensors
file.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any, cast

import torch
from typing_extensions import override

from mmerge.manifests.errors import CheckpointError
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
        _check_archive(opened)
        with FakeTensorMode():
            loaded = torch.load(opened, weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{where}: cannot be read as a file of tensors ({reason[:200]}). {_REMEDY}"
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{where}: holds a {type(loaded).__name__}, not tensors by name. {_REMEDY}"
        )
    return {str(name): _to_spec(str(name), value, where=where) for name, value in loaded.items()}


def _check_archive(file: _RangedFile) -> None:
    """Refuse archives whose bytes are not those of the tensors. Raises ValueError.

    PyTorch never compresses, and reads compressed entries all the same; read by range, their bytes
    would be taken for weights.
    """
    with zipfile.ZipFile(cast(Any, file)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise ValueError("its numbers are not little-endian")
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
