"""Results of scan, refine and measure tasks as objects of the store, keyed by what was read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

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

    def to_bytes(self) -> bytes:
        """Return the result as safetensors: histograms as arrays, digests in the metadata."""
        arrays: dict[str, NDArray[np.generic]] = {
            f"{name}.vector": values for name, values in self.vectors.items()
        }
        for name, (bins, counts) in self.histograms.items():
            arrays |= {f"{name}.bins": bins, f"{name}.counts": counts}
        return bytes(save_arrays(arrays, metadata={"digests": json.dumps(self.digests)}))

    @classmethod
    def from_bytes(cls, data: bytes) -> ScanResult:
        """Return the result that `to_bytes` wrote. Raises ValueError when the bytes are damaged."""
        try:
            length = int.from_bytes(data[:8], "little")
            digests = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["digests"])
            arrays = load_arrays(data)
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
            )
        except Exception as error:
            raise ValueError(f"damaged scan result: {error}") from error


def scan_key(digest: str) -> str:
    """Return the key of a cached scan result."""
    return f"surveys/{digest}.safetensors"


def read_scan(store: Store, digest: str) -> ScanResult | None:
    """Return a cached scan result, or None where there is none that can be read."""
    try:
        return ScanResult.from_bytes(store.read(scan_key(digest)))
    except (NotFound, ValueError):
        return None


def piece_name(name: str, row_start: int) -> str:
    """Return the name of a piece of a tensor within a scan."""
    return f"{name}:{row_start}"
