"""Results of scan, refine and measure tasks as objects of the store, keyed by what was read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from mmerge.manifests.digest import to_canonical_json
from mmerge.manifests.errors import NotFound
from mmerge.manifests.stores.base import Store

SparseHistogram = tuple[NDArray[np.unsignedinteger[Any]], NDArray[np.int64]]


@dataclass(frozen=True)
class ScanResult:
    """The result of a scan or refine task, as it lies in the store."""

    digests: dict[str, list[str]]
    """BLAKE3 per piece ("name:row_start"): base first, then the experts; for copied tensors one."""
    histograms: dict[str, SparseHistogram]
    """By "piece:expert position": the non-empty bins of the magnitude histogram, and their counts.
    """
    vectors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """By "piece:quantity": what a stage of vectors found."""
    checksums: dict[str, list[str]] = field(default_factory=dict)
    """Per piece, a fast checksum for each of its digests, with which later passes compare; none in
    scans of version 0.1.
    """

    def to_bytes(self, key: str) -> bytes:
        """Return the result as safetensors: histograms as arrays, digests in the metadata.

        The metadata has a checksum of all of it and of the object's `key`, so that neither a
        changed bit nor a swapped object is taken for a result.
        """
        arrays: dict[str, NDArray[np.generic]] = {
            f"{name}.vector": values for name, values in self.vectors.items()
        }
        for name, (bins, counts) in self.histograms.items():
            arrays |= {f"{name}.bins": bins, f"{name}.counts": counts}
        metadata = {"digests": json.dumps(self.digests)}
        if self.checksums:
            metadata["checksums"] = json.dumps(self.checksums)
        metadata["checksum"] = _make_checksum(key, metadata, arrays)
        return bytes(save_arrays(arrays, metadata=metadata))

    @classmethod
    def from_bytes(cls, data: bytes, key: str) -> ScanResult:
        """Return the result that `to_bytes` wrote.

        Raises:
            ValueError: the bytes are damaged, are those of another key, or have no checksum
                (version 0.1 wrote none).
        """
        try:
            length = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            digests = json.loads(metadata["digests"])
            arrays = load_arrays(data)
            if metadata.pop("checksum") != _make_checksum(key, metadata, arrays):
                raise ValueError("its checksum differs from its content")
            vectors = {
                name.removesuffix(".vector"): arrays.pop(name)
                for name in list(arrays)
                if name.endswith(".vector")
            }
            names = {name.rpartition(".")[0] for name in arrays}
            return cls(
                digests,
                {name: (arrays[f"{name}.bins"], arrays[f"{name}.counts"]) for name in names},
                vectors,
                json.loads(metadata.get("checksums", "{}")),
            )
        except Exception as error:
            raise ValueError(f"damaged scan result: {error}") from error


def _make_checksum(
    key: str, metadata: Mapping[str, str], arrays: Mapping[str, NDArray[np.generic]]
) -> str:
    """Return the digest of all that a result holds, and of its key."""
    texts = [metadata[name] for name in ("digests", "checksums") if name in metadata]
    digest = blake3(to_canonical_json([key, *texts]))
    for name, values in sorted(arrays.items()):
        digest.update(to_canonical_json([name, str(values.dtype), list(values.shape)]))
        digest.update(values.tobytes())
    return str(digest.hexdigest())


def scan_key(digest: str) -> str:
    """Return the key of a cached scan result."""
    return f"surveys/{digest}.safetensors"


def read_scan(store: Store, digest: str) -> ScanResult | None:
    """Return a cached scan result, or None where there is none that is whole."""
    key = scan_key(digest)
    try:
        return ScanResult.from_bytes(store.read(key), key)
    except (NotFound, ValueError):
        return None


def write_scan(store: Store, digest: str, result: ScanResult) -> None:
    """Cache the result of a scan, refine or measure task."""
    key = scan_key(digest)
    store.put(key, result.to_bytes(key))


def piece_name(name: str, row_start: int) -> str:
    """Return the name of a piece of a tensor within a scan."""
    return f"{name}:{row_start}"
