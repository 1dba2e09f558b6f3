"""What a footer claims is read as pyarrow reads it, and a damaged one neither ends the process nor takes memory."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actlake.storage.parquet_bounds import check_footer
from actlake.storage.parquet_footer import column_claims
from actlake.storage.parquet_seal import read_footer, write_sealed


def _file(n_rows: int = 40) -> bytes:
    table = pa.table({"n": range(n_rows), "name": [f"é{i}" for i in range(n_rows)], "parts": [[1, 2]] * n_rows})
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=16)
    return sink.getvalue()


def _footer(data: bytes) -> pq.FileMetaData:
    return pq.ParquetFile(pa.BufferReader(data)).metadata


def test_claims_are_those_that_pyarrow_shows() -> None:
    footer = _footer(_file())
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    shown = [group.column(i) for group in groups for i in range(group.num_columns)]
    assert len(shown) == 9
    assert [(one.path, one.n_values, one.nbytes) for one in column_claims(footer)] == [
        (one.path_in_schema, one.num_values, one.total_uncompressed_size) for one in shown
    ]


def test_no_flipped_bit_of_a_footer_ends_the_process() -> None:
    """``RowGroupMetaData.column`` of pyarrow 26 aborts at some of these."""
    whole = _file()
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for bit in range(8 * begin, 8 * len(whole), 3):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        try:
            check_footer(_footer(bytes(data)), n_rows=40, n_values=80)
        except (ValueError, OSError, pa.ArrowException):
            refused += 1
    assert refused > 400


def test_more_values_than_there_can_be_are_refused() -> None:
    footer = _footer(_file())
    check_footer(footer, n_rows=40, n_values=32)
    with pytest.raises(ValueError, match=r"parts\.list\.element has 32 values in \d+ bytes; there can be at most 31 "):
        check_footer(footer, n_rows=40, n_values=31)


@pytest.mark.parametrize("n_columns", [3, 2000])
def test_every_flipped_bit_of_a_sealed_footer_is_found(n_columns: int) -> None:
    """That of 2,000 columns is longer than what is read at once."""
    table = pa.table({f"c{i}": [i, 7] for i in range(n_columns)})
    whole = write_sealed(table, compression="zstd", write_statistics=False, row_group_size=2)
    footer = read_footer(io.BytesIO(whole))
    assert pq.ParquetFile(io.BytesIO(whole), metadata=footer).read().equals(table)
    n_bits = 8 * (int.from_bytes(whole[-8:-4], "little") + 8)
    assert (n_bits > 8 * 65536) == (n_columns == 2000)
    for bit in range(8 * len(whole) - n_bits, 8 * len(whole), max(1, n_bits // 1500)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        if b"footer_crc32c" in data:
            with pytest.raises((ValueError, OSError, pa.ArrowException)):
                read_footer(io.BytesIO(bytes(data)))


def test_a_footer_without_a_seal_is_read() -> None:
    data = _file()
    assert read_footer(io.BytesIO(data)).equals(_footer(data))
