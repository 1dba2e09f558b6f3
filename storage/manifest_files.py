"""The files of a manifest: records as columns, groups of 1,024 commits, and the index of 64 groups.

A group has all of its commits, with the checksums of the objects: 2 GB in 1,318 files for 1.35M shards of 136 objects.
The index of a finished dataset has the other columns again, and the sizes of each array's objects as a column of their
own: 21 files, of which opening reads four columns.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actlake.storage.corpus_files import ObjectReader
from actlake.storage.errors import CorruptObjectError, NotFoundError
from actlake.storage.parquet_bounds import check_footer, require_whole
from actlake.storage.parquet_seal import read_footer, write_sealed
from actlake.storage.records import GROUP_SHARDS, ObjectRecord, Provenance, ShardRecord
from actlake.storage.stored_json import parse_object
from actlake.storage.stores import Store

#: Objects of one shard: as many as a spec has room for hook points.
_MAX_OBJECTS = 2**17

_OF_RECORD = ("shard", "revision", "first_row", "n_rows", "n_void", "nbytes", "dataset_id")
_OF_PROVENANCE = ("attempt", "host", "device", "started", "finished", "n_tokens", "forward_s", "encode_s", "write_s")

#: Groups in one object of the index.
INDEX_GROUPS = 64

REMEDY = "delete root.json and manifest/; 'actlake ingest' with the job file writes both again from the commits"

_OBJECT = pa.struct(
    [("array", pa.string()), ("nbytes", pa.int64()), ("crc32c", pa.uint32()), ("index_crc32c", pa.uint32())]
)

#: One row per committed shard, ascending.
SCHEMA = pa.schema(
    [
        ("shard", pa.int64()),
        ("revision", pa.int32()),
        ("first_row", pa.int64()),
        ("n_rows", pa.int64()),
        ("n_void", pa.int64()),
        ("nbytes", pa.int64()),
        ("dataset_id", pa.string()),
        ("objects", pa.list_(_OBJECT)),
        ("stats_nbytes", pa.int64()),
        ("stats_crc32c", pa.uint32()),
        ("attempt", pa.string()),
        ("host", pa.string()),
        ("device", pa.string()),
        ("software", pa.string()),
        ("started", pa.string()),
        ("finished", pa.string()),
        ("n_tokens", pa.int64()),
        ("forward_s", pa.float64()),
        ("encode_s", pa.float64()),
        ("write_s", pa.float64()),
    ]
)

#: The columns but ``objects``: what an index has as they are.
SCALARS = tuple(name for name in SCHEMA.names if name != "objects")

SIZES = "nbytes:"


def group_key(group: int) -> str:
    """Return the key of a compacted group."""
    return f"manifest/{group:08d}.parquet"


def index_key(number: int, n_shards: int) -> str:
    """Return the key of an index object: of the shards from ``65,536 number`` on, so many of them."""
    return f"manifest/index-{number:08d}-{n_shards:05d}.parquet"


def index_keys(n_shards: int) -> list[str]:
    """Return the keys of the index of a dataset of so many shards."""
    most = INDEX_GROUPS * GROUP_SHARDS
    return [index_key(start // most, min(most, n_shards - start)) for start in range(0, n_shards, most)]


# --- Records and columns -------------------------------------------------------------------------------------------


def to_table(records: Iterable[ShardRecord]) -> pa.Table:
    """Return records, ascending, as columns."""
    rows = list(records)
    columns: dict[str, Any] = {name: [getattr(record, name) for record in rows] for name in _OF_RECORD}
    for name in _OF_PROVENANCE:
        columns[name] = [getattr(record.provenance, name) for record in rows]
    columns["software"] = [json.dumps(dict(record.provenance.software), sort_keys=True) for record in rows]
    columns["stats_nbytes"] = [record.stats.nbytes for record in rows]
    columns["stats_crc32c"] = [record.stats.crc32c for record in rows]
    columns["objects"] = _objects([record.objects for record in rows])
    return pa.table([pa.array(columns[name], _type(name)) for name in SCHEMA.names], schema=SCHEMA)


def _objects(by_record: Sequence[Mapping[str, ObjectRecord]]) -> pa.Array:
    # By column: a dictionary for each object takes five times as long.
    named = [sorted(objects.items()) for objects in by_record]
    flat = [item for items in named for item in items]
    columns = {"array": [name for name, _ in flat]} | {
        name: [getattr(item, name) for _, item in flat] for name in ("nbytes", "crc32c", "index_crc32c")
    }
    structs = pa.StructArray.from_arrays(
        [pa.array(columns[field.name], field.type) for field in _OBJECT], fields=list(_OBJECT)
    )
    ends = pa.array(np.cumsum([0, *map(len, named)], dtype=np.int32))
    return pa.ListArray.from_arrays(ends, structs, type=_type("objects"))


def to_records(table: pa.Table) -> Iterator[ShardRecord]:
    """Yield the records of a table of the whole schema; raise ``CorruptObjectError`` for what can be none."""
    for batch in table.to_batches(max_chunksize=256):
        try:
            yield from map(_from_row, batch.to_pylist())
        except (ValueError, TypeError) as error:
            raise CorruptObjectError(f"a manifest is damaged ({error}); {REMEDY}") from error


def sizes_by_array(table: pa.Table, arrays: Sequence[str] | None = None) -> pa.Table:
    """Return the stored bytes of arrays (default: all there are, sorted), int64 by shard, null where absent."""
    lists = table["objects"].combine_chunks()
    objects = lists.flatten()
    encoded = objects.field("array").dictionary_encode()
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    nbytes, row = (
        objects.field("nbytes").to_numpy(),
        np.repeat(np.arange(len(table)), np.diff(lists.offsets.to_numpy())),
    )
    found = {}
    for name in sorted(names) if arrays is None else arrays:
        column = np.full(len(table), -1, dtype=np.int64)
        if name in names:
            here = codes == names.index(name)
            column[row[here]] = nbytes[here]
        found[name] = pa.array(column, mask=column < 0)
    return pa.table(found)


def sum_sizes(table: pa.Table) -> dict[str, int]:
    """Return the stored bytes of each array over a table's shards."""
    objects = table["objects"].combine_chunks().flatten()
    flat = pa.table({"array": objects.field("array"), "nbytes": objects.field("nbytes")})
    summed = flat.group_by("array", use_threads=False).aggregate([("nbytes", "sum")])
    return dict(zip(summed["array"].to_pylist(), summed["nbytes_sum"].to_pylist(), strict=True))


def _from_row(row: Mapping[str, Any]) -> ShardRecord:
    return ShardRecord(
        dataset_id=row["dataset_id"],
        shard=row["shard"],
        revision=row["revision"],
        first_row=row["first_row"],
        n_rows=row["n_rows"],
        n_void=row["n_void"],
        objects={
            o["array"]: ObjectRecord(nbytes=o["nbytes"], crc32c=o["crc32c"], index_crc32c=o["index_crc32c"])
            for o in row["objects"]
        },
        stats=ObjectRecord(nbytes=row["stats_nbytes"], crc32c=row["stats_crc32c"]),
        provenance=Provenance(
            software=parse_object(row["software"].encode()), **{name: row[name] for name in _OF_PROVENANCE}
        ),
    )


# --- Files ---------------------------------------------------------------------------------------------------------


def group_bytes(table: pa.Table) -> bytes:
    """Return the file of a group; without statistics, which nobody reads."""
    return write_sealed(table.combine_chunks(), compression="zstd", write_page_checksum=True, write_statistics=False)


def index_bytes(tables: Iterable[pa.Table]) -> bytes:
    """Return the index object of consecutive tables of the whole schema: one row group.

    Sizes of one array differ by a fraction of a percent: as packed differences they take 2.9 bytes and 6 ns to read, as
    plain zstd 3.3 bytes and 40 ns (65,536 shards, 136 arrays, one core).
    """
    scalars, sizes = [], []
    for table in tables:
        scalars.append(table.select(SCALARS))
        sizes.append(sizes_by_array(table))
    # An array that no shard of a table has gets a column of nulls.
    by_array = pa.concat_tables(sizes, promote_options="default")
    whole = pa.concat_tables(scalars)
    for name in sorted(by_array.column_names):
        whole = whole.append_column(SIZES + name, by_array[name])
    texts = [field.name for field in whole.schema if pa.types.is_string(field.type)]
    integers = [field.name for field in whole.schema if pa.types.is_signed_integer(field.type)]
    return write_sealed(
        whole.combine_chunks(),
        row_group_size=max(1, len(whole)),
        compression="zstd",
        use_dictionary=texts,
        column_encoding=dict.fromkeys(integers, "DELTA_BINARY_PACKED"),
        write_page_checksum=True,
        write_statistics=False,
    )


def open_footer(store: Store, key: str, columns: Sequence[str], shards: range) -> pq.FileMetaData:
    """Return the footer of a file that has just these columns of the schema, and those of sizes, of these shards."""
    with _reading(store, key):
        footer = read_footer(ObjectReader(store, key))
        every = footer.schema.to_arrow_schema()
        sizes = [field for field in every if field.name.startswith(SIZES)]
        # With a schema given, pyarrow would fill absent columns with nulls.
        expected = pa.schema([SCHEMA.field(name) for name in columns])
        if not pa.schema([field for field in every if field not in sizes]).equals(expected) or not all(
            field.type == pa.int64() for field in sizes
        ):
            raise ValueError("other columns than a manifest's")
        # A shard has at most as many objects as there are arrays: 434 hook points in the largest model that we know.
        check_footer(footer, n_rows=len(shards), n_values=len(shards) * _MAX_OBJECTS)
        if footer.num_rows != len(shards):
            raise ValueError(f"{footer.num_rows} rows, not those of the {len(shards)} shards from {shards.start} on")
        return footer


def read_columns(store: Store, key: str, footer: pq.FileMetaData, names: Sequence[str], shards: range) -> pa.Table:
    """Return columns of a file whose footer ``open_footer`` gave, nulls for those of sizes that it lacks."""
    present = set(footer.schema.to_arrow_schema().names)
    with _reading(store, key):
        # Buffered: the columns come in one read, or few.
        options = {"metadata": footer, "pre_buffer": True, "page_checksum_verification": True}
        table = pq.ParquetFile(ObjectReader(store, key), **options).read([name for name in names if name in present])
        if present.intersection(names):
            _check(table, shards)
    for name in names:
        if name not in present:
            table = table.append_column(name, pa.nulls(footer.num_rows, pa.int64()))
    # Fields of a file carry Parquet ids, which would get into the bytes of a group written from them.
    return table.select(names).cast(pa.schema([(name, _type(name)) for name in names]))


def _check(table: pa.Table, shards: range) -> None:
    """Raise ``ValueError`` for columns that no records have: a file is anyone's until it is looked at."""
    sizes = [name for name in table.column_names if name.startswith(SIZES)]
    require_whole(table, len(shards), nullable=sizes)
    for name in {"first_row", "n_rows", "n_void", "nbytes", *sizes}.intersection(table.column_names):
        if (least := pc.min(table[name]).as_py()) is not None and least < 0:
            raise ValueError(f"{name} = {least}")
    if "shard" in table.column_names:
        numbers = table["shard"].combine_chunks()
        # Not to_numpy, which imports pandas: 2 s of a core.
        found = np.frombuffer(numbers.buffers()[1], dtype=np.int64, count=len(numbers), offset=8 * numbers.offset)
        if not np.array_equal(found, np.arange(shards.start, shards.stop)):
            raise ValueError(f"other shards than {shards.start} to {shards.stop - 1}")
    if "software" in table.column_names:
        for text in pc.unique(table["software"]).to_pylist():
            parse_object(text.encode())


@contextmanager
def _reading(store: Store, key: str) -> Iterator[None]:
    try:
        yield
    except NotFoundError:
        raise
    except (ValueError, LookupError, OSError, pa.ArrowException) as error:
        # Arrow's own complaints carry no errno; a disk's or a network's do, and say nothing about the data.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptObjectError(f"{store.url}/{key} is damaged ({error}); {REMEDY}") from error


def _type(name: str) -> pa.DataType:
    return pa.int64() if name.startswith(SIZES) else SCHEMA.field(name).type
