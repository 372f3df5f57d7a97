"""Headers of safetensors files: strict parsing, and writing before the data.

Format: u64 little-endian header length, JSON header, data.
https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from mmerge.manifests.digest import parse_json, to_canonical_json
from mmerge.manifests.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The limit of the format itself."""

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes per entry of each supported safetensors dtype."""

FLOAT_DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")
"""Dtypes that can be merged."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a safetensors file; `offset` is in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def num_entries(self) -> int:
        """Number of entries: the product of the shape, 1 for a scalar."""
        return prod(self.shape)


def parse_header(
    prefix: bytes | memoryview, *, file_bytes: int, where: str
) -> dict[str, TensorSpec]:
    """Return the tensors of a safetensors file by name, ordered by offset.

    Args:
        prefix: the first bytes of the file, at least its whole header.
        file_bytes: size of the file.
        where: name of the file in errors.

    Raises:
        CheckpointError: the file is truncated or breaks a rule of the format (length, JSON, dtype,
            shape, offsets without gap or overlap).
    """
    header_bytes = header_length(prefix[:8], file_bytes=file_bytes, where=where)
    try:
        raw = parse_json(
            bytes(prefix[8 : 8 + header_bytes]),
            what="safetensors header",
            max_bytes=MAX_HEADER_BYTES,
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}. The file is damaged: fetch it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{where}: the safetensors header is no JSON object. The file is damaged: fetch it"
            " again"
        )
    specs = [
        _parse_spec(name, entry, start=8 + header_bytes, where=where)
        for name, entry in raw.items()
        if name != "__metadata__"
    ]
    specs.sort(key=lambda spec: (spec.offset, spec.offset + spec.num_bytes))
    end = 8 + header_bytes
    for spec in specs:
        if spec.offset != end:
            raise CheckpointError(
                f"{where}: {spec.name}: data begins at byte {spec.offset}, expected {end}. The file"
                " is damaged: fetch it again"
            )
        end = spec.offset + spec.num_bytes
    if end != file_bytes:
        word = "truncated" if file_bytes < end else "longer than its header says"
        raise CheckpointError(
            f"{where}: the file is {word}: it has {file_bytes:,} bytes, its header describes"
            f" {end:,}. Fetch it again"
        )
    return {spec.name: spec for spec in specs}


def parse_metadata(prefix: bytes | memoryview) -> dict[str, str]:
    """Return the metadata of a safetensors file whose header `parse_header` accepted."""
    length = int(struct.unpack("<Q", bytes(prefix[:8]))[0])
    raw = parse_json(
        bytes(prefix[8 : 8 + length]), what="safetensors header", max_bytes=MAX_HEADER_BYTES
    )
    metadata = raw.get("__metadata__")
    if not isinstance(metadata, dict):
        return {}
    return {key: value for key, value in metadata.items() if isinstance(value, str)}


def header_length(first_eight: bytes | memoryview, *, file_bytes: int, where: str) -> int:
    """Return the length of the JSON header in bytes.

    Raises:
        CheckpointError: the header would be longer than the file or than the format's limit.
    """
    if file_bytes < 8 or len(first_eight) < 8:
        raise CheckpointError(
            f"{where}: {file_bytes} bytes are too few for a safetensors file. Fetch it again"
        )
    length = int(struct.unpack("<Q", bytes(first_eight[:8]))[0])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where}: announces a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are"
            " allowed. This is no safetensors file, or a damaged one"
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{where}: the file is truncated: it has {file_bytes:,} bytes, its header alone needs"
            f" {8 + length:,}. Fetch it again"
        )
    return length


def _parse_spec(name: str, entry: object, *, start: int, where: str) -> TensorSpec:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{where}: {name}: {reason}. The file is damaged: fetch it again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("its header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{where}: {name}: dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}, so its"
            " values"
            " cannot be read. Save the checkpoint with one of these dtypes"
        )
    if not _is_sizes(shape):
        raise refuse(f"shape {shape!r} is no list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise refuse(f"data_offsets {offsets!r} are no pair of sizes")
    num_bytes = prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise refuse(
            f"{dtype} {tuple(shape)} takes {num_bytes:,} bytes, its offsets span"
            f" {offsets[1] - offsets[0]:,}"
        )
    return TensorSpec(name, dtype, tuple(shape), start + offsets[0], num_bytes)


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < 1 << 62 for item in value
    )


def make_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], *, metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorSpec]]:
    """Return the header of a safetensors file, and the position of each tensor's data.

    Args:
        tensors: (name, dtype, shape) in the order of their data.
        metadata: text by text, which any safetensors reader can read.

    The header is padded with spaces to a multiple of 8 bytes, as the official writer does.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    spans: list[tuple[int, int]] = []
    for name, dtype, shape in tensors:
        begin, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        spans.append((begin, end))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = to_canonical_json(entries)
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    specs = [
        TensorSpec(name, dtype, tuple(shape), start + begin, stop - begin)
        for (name, dtype, shape), (begin, stop) in zip(tensors, spans, strict=True)
    ]
    return struct.pack("<Q", len(text)) + text, specs
