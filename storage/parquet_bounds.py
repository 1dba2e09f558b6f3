"""What a Parquet object may make a reader do: a few hundred bytes of it can say that they are a billion values."""

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.parquet_footer import column_claims

#: A column of a row group, unpacked: 100 times the largest of ours.
_MAX_NBYTES = 1 << 30


def check_footer(footer: pq.FileMetaData, *, n_rows: int, n_values: int | None = None) -> None:
    """Raise ``ValueError`` for more than ``n_rows`` rows, or ``n_values`` values of a column (default: one a row).

    A footer may lie about its pages: the rest of what is read is then refused by Arrow, page by page.
    """
    most = n_rows if n_values is None else n_values
    if not 0 <= footer.num_rows <= n_rows or footer.num_row_groups > max(1, n_rows):
        raise ValueError(f"{footer.num_rows} rows in {footer.num_row_groups} groups; there can be at most {n_rows}")
    for column in column_claims(footer):
        if not 0 <= column.n_values <= most or not 0 <= column.nbytes <= _MAX_NBYTES:
            raise ValueError(
                f"{column.path} has {column.n_values} values in {column.nbytes} bytes; there can be at most {most} in "
                f"{_MAX_NBYTES}"
            )


def require_whole(table: pa.Table, n_rows: int, nullable: Iterable[str] = ()) -> None:
    """Raise ``ValueError`` for a table that has not ``n_rows`` rows, lacks a value, or holds text that is no UTF-8.

    Columns in ``nullable`` may lack values.
    """
    table.validate(full=True)
    if len(table) != n_rows:
        raise ValueError(f"{len(table)} rows, where the footer says {n_rows}")
    for name in set(table.column_names).difference(nullable):
        if _n_nulls(table[name].combine_chunks()):
            raise ValueError(f"{name} lacks values")


def _n_nulls(array: pa.Array | pa.ChunkedArray) -> int:
    if isinstance(array, pa.ChunkedArray):
        return sum(map(_n_nulls, array.chunks))
    nulls = int(array.null_count)
    if pa.types.is_list(array.type):
        nulls += _n_nulls(array.flatten())
    if pa.types.is_struct(array.type):
        nulls += sum(_n_nulls(array.field(place)) for place in range(array.type.num_fields))
    return nulls
