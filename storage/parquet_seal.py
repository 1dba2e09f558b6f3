"""A checksum of a Parquet footer, kept in the footer itself: pages have checksums of their own, footers have none.

The key-value metadata of the file have ``footer_crc32c``: 8 hex digits, the crc32c of the footer's bytes with zeros
in the place of the digits.
"""

import io
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.arrays import crc32c

_KEY = b"footer_crc32c"
_ZEROS = b"00000000"
_MAGIC = b"PAR1"
#: The length of the footer and the magic number, at the end of every file.
_TAIL_NBYTES = 8
#: Read at once at the end of a file: most footers and their tail.
_GUESS_NBYTES = 64 << 10


def write_sealed(table: pa.Table, **options: Any) -> bytes:
    """Return a table as a Parquet file with a sealed footer; ``options`` are those of ``parquet.write_table``."""
    row_group_size = options.pop("row_group_size", None)
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, **options) as writer:
        writer.write_table(table, row_group_size=row_group_size)
        writer.add_key_value_metadata({_KEY.decode(): _ZEROS.decode()})
    data = bytearray(sink.getvalue())
    begin = len(data) - _TAIL_NBYTES - int.from_bytes(data[-_TAIL_NBYTES:-4], "little")
    place = begin + _place(data[begin:-_TAIL_NBYTES])
    data[place : place + len(_ZEROS)] = b"%08x" % crc32c(memoryview(data)[begin:-_TAIL_NBYTES])
    return bytes(data)


def read_footer(file: BinaryIO | io.RawIOBase) -> pq.FileMetaData:
    """Return a file's footer; raise ``ValueError`` for one that is not as it was sealed.

    Files of an earlier actlake have no seal, and pass.
    """
    footer = _footer_bytes(file)
    if _KEY in footer:
        place = _place(footer)
        digits = footer[place : place + len(_ZEROS)]
        found = crc32c(footer[:place] + _ZEROS + footer[place + len(_ZEROS) :])
        if digits != b"%08x" % found:
            raise ValueError(f"footer crc32c expected {digits!r:.20}, found {found:08x}")
    return pq.read_metadata(pa.BufferReader(_MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC))


def _place(footer: bytes | bytearray) -> int:
    """Return where the digits are: Thrift puts the field's header and the length between key and value."""
    return footer.rindex(_KEY) + len(_KEY) + 2


def _footer_bytes(file: BinaryIO | io.RawIOBase) -> bytes:
    size = file.seek(0, io.SEEK_END)
    end = _read(file, max(0, size - _GUESS_NBYTES), size)
    if len(end) < _TAIL_NBYTES or end[-4:] != _MAGIC:
        raise ValueError("no Parquet file: its end is missing")
    n = int.from_bytes(end[-_TAIL_NBYTES:-4], "little")
    if n > size - _TAIL_NBYTES - len(_MAGIC):
        raise ValueError(f"a footer of {n} bytes in a file of {size}")
    if n + _TAIL_NBYTES > len(end):
        end = _read(file, size - _TAIL_NBYTES - n, size)
    return end[-_TAIL_NBYTES - n : -_TAIL_NBYTES]


def _read(file: BinaryIO | io.RawIOBase, start: int, stop: int) -> bytes:
    file.seek(start)
    found = bytearray()
    while len(found) < stop - start and (more := file.read(stop - start - len(found))):
        found += more
    return bytes(found)
