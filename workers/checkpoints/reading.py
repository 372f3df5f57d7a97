"""Bytes of tensor sources: read from a store, or computed from several stored tensors."""

from __future__ import annotations

from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.stores.base import ReadableStore
from mmerge.manifests.stores.open import open_readable_store
from mmerge.workers.checkpoints.sources import FormedSource, OpenStores, TensorSource

COMPARED_BYTES = 4 << 20
"""Bytes of each tensor that are compared at once."""


def read_source(
    source: TensorSource, *, stores: dict[str, ReadableStore], offset: int, num_bytes: int
) -> memoryview:
    """Return `num_bytes` bytes of a tensor, from `offset` bytes after its start.

    A store that is missing in `stores` is opened and added.

    Raises:
        NotFound, StoreError: the file is missing or shorter than its header says.
    """
    if isinstance(source, FormedSource):
        # Imported here: it needs torch, which stored tensors do without.
        from mmerge.workers.checkpoints.formed_weights import read_formed

        entry_bytes = DTYPE_BYTES[source.spec.dtype]
        start, stop = offset // entry_bytes, (offset + num_bytes) // entry_bytes
        return read_formed(source, stores, read=read_source, start=start, stop=stop)
    store = stores.get(source.uri)
    if store is None:
        store = stores[source.uri] = open_readable_store(source.uri)
    tensor_start = source.spec.offset
    return store.read_forward(
        source.file,
        offset=tensor_start + offset,
        num_bytes=num_bytes,
        start=tensor_start,
        stop=tensor_start + source.spec.num_bytes,
    )


def has_equal_bytes(first: TensorSource, second: TensorSource, *, stores: OpenStores) -> bool:
    """Return whether two tensors have the same dtype, shape and bytes; reads both in pieces."""
    if (first.spec.dtype, first.spec.shape) != (second.spec.dtype, second.spec.shape):
        return False
    # A store reads one range of a file forward at a time. Two ranges in turn would drop what was
    # prefetched for the other, and request it again.
    is_same_file = (first.uri, first.file) == (second.uri, second.file)
    second_stores = OpenStores() if is_same_file else stores
    num_bytes = first.spec.num_bytes
    for offset in range(0, num_bytes, COMPARED_BYTES):
        size = min(COMPARED_BYTES, num_bytes - offset)
        piece = read_source(first, stores=stores, offset=offset, num_bytes=size)
        if piece != read_source(second, stores=second_stores, offset=offset, num_bytes=size):
            return False
    return True
