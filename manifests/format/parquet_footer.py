"""Sizes of the columns of a Parquet file, from its footer, before pyarrow decodes anything.

pyarrow's own access to the metadata of a column aborts the process where a footer is damaged, so
its Thrift structures (compact protocol) are read here. Of the format's definition only the path to
the sizes is used: FileMetaData 4 (row groups), RowGroup 1 (columns), ColumnChunk 3 (metadata),
ColumnMetaData 5 (number of values) and 6 (bytes once decompressed).
Definition: https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MAGIC = b"PAR1"
_TAIL_BYTES = 8
_MAX_DEPTH = 16
_BOOLEANS = (1, 2)
_BYTE, _DOUBLE, _BINARY, _STRUCT = 3, 7, 8, 12
_INTEGERS = (4, 5, 6)
_LISTS = (9, 10)


def read_column_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the number of values and the decompressed bytes of each column of each row group.

    Raises:
        ValueError: this is no Parquet file, or its footer is damaged.
    """
    footer_bytes = int.from_bytes(data[-_TAIL_BYTES:-4], "little")
    if data[-4:] != MAGIC or footer_bytes + _TAIL_BYTES > len(data):
        raise ValueError("is no Parquet file")
    footer = data[len(data) - _TAIL_BYTES - footer_bytes : len(data) - _TAIL_BYTES]
    try:
        file_metadata = _Reader(footer).read_struct()
        for row_group in file_metadata[4]:
            for column in row_group[1]:
                yield int(column[3][5]), int(column[3][6])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("has a damaged footer") from error


class _Reader:
    """Reads values of the compact protocol; structures become dictionaries by field number."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0
        self._depth = 0

    def read_struct(self) -> dict[int, Any]:
        """Return the fields of a structure. Raises IndexError at the end of the bytes."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("has a footer that is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._read_byte():
            delta, kind = header >> 4, header & 15
            number = number + delta if delta else self._read_integer()
            fields[number] = kind == _BOOLEANS[0] if kind in _BOOLEANS else self._read_value(kind)
        self._depth -= 1
        return fields

    def _read_value(self, kind: int) -> Any:
        if kind in _INTEGERS:
            return self._read_integer()
        if kind == _BINARY:
            return self._skip(self._read_varint())
        if kind in _LISTS:
            return self._read_list()
        if kind == _STRUCT:
            return self.read_struct()
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BYTE or kind in _BOOLEANS:
            return self._read_byte()
        raise ValueError(f"has a footer with values of the unknown type {kind}")

    def _read_list(self) -> list[Any]:
        header = self._read_byte()
        count, kind = header >> 4, header & 15
        if count == 15:
            count = self._read_varint()
        if count > len(self._data) - self._position:
            raise IndexError  # each item takes a byte at least
        return [self._read_value(kind) for _ in range(count)]

    def _read_byte(self) -> int:
        value = self._data[self._position]
        self._position += 1
        return value

    def _skip(self, num_bytes: int) -> None:
        self._position += num_bytes

    def _read_varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._read_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("has a footer with a number of more than 64 bits")

    def _read_integer(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)
