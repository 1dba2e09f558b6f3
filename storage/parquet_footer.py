"""The columns that a Parquet footer claims, read from its bytes.

pyarrow 26 ends the process where it is asked for a column of some damaged footers (``RowGroupMetaData.column`` lets an
exception of C++ through). A footer is one Thrift struct in the compact protocol; ids and types are those of
``parquet.thrift`` of the Parquet format 2.11.
"""

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

#: Fields: of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _META_DATA = 4, 1, 3
_PATH, _NUM_VALUES, _UNCOMPRESSED = 3, 5, 6

#: Types of the compact protocol.
_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
#: A footer nests seven deep.
_MAX_DEPTH = 16


@dataclass(frozen=True, kw_only=True)
class ColumnClaim:
    """What a footer says of one column of one row group."""

    path: str
    n_values: int
    nbytes: int


def column_claims(footer: pq.FileMetaData) -> Iterator[ColumnClaim]:
    """Yield what a footer says of each column of each row group; raise ``ValueError`` where it says nothing of it."""
    sink = io.BytesIO()
    footer.write_metadata_file(sink)
    written = sink.getvalue()
    # The magic number, the struct, its length in 4 bytes, the magic number.
    for group in _struct(_Reader(written[4:-8])).get(_ROW_GROUPS, ()):
        for chunk in group.get(_COLUMNS, ()):
            column = chunk.get(_META_DATA, {})
            path, n_values, nbytes = (column.get(name) for name in (_PATH, _NUM_VALUES, _UNCOMPRESSED))
            if not isinstance(path, list) or not isinstance(n_values, int) or not isinstance(nbytes, int):
                raise ValueError("a column without path, number of values or size")
            yield ColumnClaim(path=b".".join(path).decode(errors="replace"), n_values=n_values, nbytes=nbytes)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at, self.depth = data, 0, 0

    def take(self, n: int) -> bytes:
        found = self._data[self._at : self._at + n]
        if n < 0 or len(found) < n:
            raise ValueError("the footer ends in the middle of a value")
        self._at += n
        return found

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            if (shift := shift + 7) > 63:
                raise ValueError("a number of more than 64 bits")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)


def _struct(reader: _Reader) -> dict[int, Any]:
    """Return a struct's values by field id."""
    found: dict[int, Any] = {}
    field, reader.depth = 0, reader.depth + 1
    if reader.depth > _MAX_DEPTH:
        raise ValueError("structs too deep in each other")
    while (header := reader.take(1)[0]) != _STOP:
        delta, kind = header >> 4, header & 0x0F
        field = field + delta if delta else reader.zigzag()
        found[field] = kind == _TRUE if kind in (_TRUE, _FALSE) else _value(reader, kind)
    reader.depth -= 1
    return found


def _value(reader: _Reader, kind: int) -> Any:
    if kind in (_I16, _I32, _I64):
        return reader.zigzag()
    if kind == _BINARY:
        return reader.take(reader.varint())
    if kind == _STRUCT:
        return _struct(reader)
    if kind in (_LIST, _SET):
        return _list(reader)
    if kind in (_TRUE, _FALSE, _BYTE):
        return reader.take(1)[0]
    if kind == _DOUBLE:
        return struct.unpack("<d", reader.take(8))[0]
    # Parquet's metadata has no maps.
    raise ValueError(f"a value of type {kind}")


def _list(reader: _Reader) -> list[Any]:
    header = reader.take(1)[0]
    n, kind = header >> 4, header & 0x0F
    if n == 15:
        n = reader.varint()
    # Each takes a byte at least, so the footer's length bounds the list: a claim of more ends in ``take``.
    return [_value(reader, kind) for _ in range(n)]
