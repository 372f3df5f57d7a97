"""The Parquet table of a build: one row per stored tensor piece, for loaders, DuckDB and pandas."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pydantic import TypeAdapter, ValidationError

from mmerge.manifests import limits
from mmerge.manifests.digest import SHOWN_DIGITS, digest_bytes
from mmerge.manifests.errors import (
    REPAIR,
    ManifestError,
    NotFound,
    StoreError,
    StoreUnavailable,
    first_line,
)
from mmerge.manifests.format.entry import ObjectEntry, ShardEntry, TensorRow, validate_key
from mmerge.manifests.format.manifest import TableEntry
from mmerge.manifests.format.parquet_footer import read_column_sizes
from mmerge.manifests.format.safetensors_header import DTYPE_BYTES
from mmerge.manifests.format.tensor_names import layer_of
from mmerge.manifests.stores.base import ReadableStore

SCHEMA = pa.schema(
    [
        ("object", pa.string()),
        ("shard", pa.string()),
        ("layer", pa.int32()),
        ("name", pa.string()),
        ("role", pa.string()),
        ("expert", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("row_start", pa.int64()),
        ("row_stop", pa.int64()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("digest", pa.string()),
        ("num_entries", pa.int64()),
        ("num_kept", pa.int64()),
        ("num_agreeing", pa.int64()),
        ("num_masked", pa.int64()),
        ("task_vector_norm", pa.float32()),
        ("delta_norm", pa.float32()),
        ("consensus", pa.list_(pa.int64())),
        ("overlaps", pa.list_(pa.int64())),
    ]
)
MAX_TEXT_BYTES = 1 << 16
"""Of a key, a name or a digest."""
_TEXTS = [field.name for field in SCHEMA if field.type == pa.string()]
_STATISTICS = (
    "num_entries",
    "num_kept",
    "num_agreeing",
    "num_masked",
    "task_vector_norm",
    "delta_norm",
    "consensus",
    "overlaps",
)


class StoredRow(TensorRow):
    """A tensor row with the key and shard of its object."""

    object: str
    shard: str


Group = tuple[str, str]
"""Key of an object, and its shard in this build."""
_ROWS = TypeAdapter(list[StoredRow])


def table_key(build: str, digest: str) -> str:
    """Return the key of a build's table: writers of other bytes use other keys."""
    return f"builds/{build}/tensors.{digest}.parquet"


def make_table(entries: Iterable[ShardEntry]) -> bytes:
    """Return the Parquet file of the tensors of these entries, in their order."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        rows += [_to_raw_row(entry, tensor) for tensor in entry.tensors]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def _to_raw_row(entry: ShardEntry, tensor: TensorRow) -> dict[str, Any]:
    row = tensor.model_dump(exclude={"statistics"})
    statistics = tensor.statistics.model_dump() if tensor.statistics else {}
    row |= {name: statistics.get(name) for name in _STATISTICS}
    row["object"] = entry.object.key
    row["shard"] = entry.object.shard
    row["layer"] = layer_of(tensor.name)
    return row


def read_table_bytes(store: ReadableStore, entry: TableEntry) -> bytes:
    """Return the bytes of a build's table.

    Raises:
        ManifestError: it is missing, or its size or digest differs from the manifest.
    """
    try:
        data = store.read(entry.key, max_bytes=max(entry.num_bytes, 1))
    except NotFound:
        raise ManifestError(
            f"{store.uri}: {entry.key} is missing: the build is not whole. {REPAIR}"
        ) from None
    except StoreUnavailable:
        raise
    except StoreError as error:
        raise ManifestError(
            f"{Exception.__str__(error)}: the table is damaged. {REPAIR}"
        ) from error
    digest = digest_bytes(data)
    if (len(data), digest) != (entry.num_bytes, entry.digest):
        raise ManifestError(
            f"{store.uri}: {entry.key} is damaged: it has {len(data):,} bytes of digest"
            f" {digest[:SHOWN_DIGITS]}, the manifest says {entry.num_bytes:,} of"
            f" {entry.digest[:SHOWN_DIGITS]}. {REPAIR}"
        )
    return data


def read_table(store: ReadableStore, entry: TableEntry) -> list[StoredRow]:
    """Return all rows of a build's table.

    Raises:
        ManifestError: the table is missing, damaged, or inconsistent.
    """
    data = read_table_bytes(store, entry)
    try:
        return parse_table(data)
    except ValueError as error:
        raise ManifestError(
            f"{store.uri}: {entry.key} is no valid table ({error}). {REPAIR}"
        ) from error


def parse_table(data: bytes) -> list[StoredRow]:
    """Return all rows of a file that `make_table` wrote.

    Raises:
        ValueError: it is no such file, or has too many rows or bytes.
    """
    try:
        # Texts stay dictionaries until their size is known: one long text can stand in every row.
        file = pq.ParquetFile(io.BytesIO(data), read_dictionary=_TEXTS)
        num_rows = file.metadata.num_rows
        if num_rows > limits.TABLE_ROWS.value:
            raise ValueError(limits.TABLE_ROWS.describe_excess(num_rows))
        _check_size(data)
        if file.schema_arrow.names != SCHEMA.names:
            raise ValueError(f"has the columns {', '.join(file.schema_arrow.names[:30])[:500]}")
        # Threads cost more than they save for a table of this size.
        table = file.read(use_threads=False)
        _check_texts(table)
        # Rows of dictionaries take three times as long to make as rows of texts.
        return _parse_rows(table.cast(SCHEMA).to_pylist())
    # pyarrow raises OSError for a page header that it cannot parse.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(_first_reason(error)) from error


def _check_size(data: bytes) -> None:
    """Compare the bytes of a Parquet file with the limit before anything is decoded.

    These are the bytes of its pages once decompressed, and 8 per value: the values of a list that
    are all equal take next to nothing in a page.
    """
    num_bytes = 0
    for num_values, page_bytes in read_column_sizes(data):
        if num_values < 0 or page_bytes < 0:
            raise ValueError("has a column of negative size")
        num_bytes += page_bytes + 8 * num_values
    if num_bytes > limits.TABLE_BYTES.value:
        raise ValueError(limits.TABLE_BYTES.describe_excess(num_bytes))


def _check_texts(table: Any) -> None:
    """Compare the texts of all rows together with the limit before each row gets its own."""
    num_bytes = 0
    for name in _TEXTS:
        for chunk in table.column(name).chunks:
            lengths = pc.binary_length(chunk.dictionary).cast(pa.int64())
            longest = pc.max(lengths).as_py() or 0
            if longest > MAX_TEXT_BYTES:
                raise ValueError(
                    f"{name}: has a text of {longest:,} bytes, at most {MAX_TEXT_BYTES:,} are read"
                )
            num_bytes += pc.sum(lengths.take(chunk.indices)).as_py() or 0
    if num_bytes > limits.TABLE_BYTES.value:
        raise ValueError(limits.TABLE_BYTES.describe_excess(num_bytes))


def _first_reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"row {first['loc'][0]}, {'.'.join(map(str, first['loc'][1:]))}: {first['msg']}"
    return first_line(error)


def _parse_rows(raws: list[dict[str, Any]]) -> list[StoredRow]:
    for raw in raws:
        layer = raw.pop("layer")
        if layer != layer_of(raw["name"]):
            raise ValueError(f"{raw['name']}: layer is {layer}, its name says otherwise")
        statistics = {name: raw.pop(name) for name in _STATISTICS}
        has_statistics = any(value is not None for value in statistics.values())
        raw["statistics"] = statistics if has_statistics else None
    rows = _ROWS.validate_python(raws)  # one by one they take twice as long
    for key in {row.object for row in rows}:
        validate_key(key)
    for row in rows:
        if row.role != "mask" and prod(row.shape) * DTYPE_BYTES[row.dtype] != row.num_bytes:
            raise ValueError(
                f"{row.name}: {row.dtype} {row.shape} does not take {row.num_bytes:,} bytes"
            )
    return rows


def group_of(entry: ObjectEntry) -> Group:
    """Return the group of rows that describes an object of the manifest."""
    return entry.key, entry.shard


def group_rows(rows: Iterable[StoredRow]) -> defaultdict[Group, list[StoredRow]]:
    """Return the rows of a table by object and shard.

    One object can be two shards of a build: two experts with the same encoder.
    """
    groups: defaultdict[Group, list[StoredRow]] = defaultdict(list)
    for row in rows:
        groups[row.object, row.shard].append(row)
    return groups
