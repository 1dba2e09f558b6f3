"""The Parquet objects of a corpus: their schemas, writing them whole, reading them by ranges and by row groups."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.arrays import crc32c
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.errors import CorruptObjectError, MissingObjectError, NotFoundError
from actlake.storage.records import ObjectRecord
from actlake.storage.stores import Store

LABEL = pa.dictionary(pa.int32(), pa.string())
SEQUENCES = pa.schema(
    [
        ("sequence", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("roles", pa.list_(pa.uint8())),
        ("document", pa.string()),
        ("window", pa.int32()),
        ("offset", pa.int32()),
        ("source", LABEL),
    ]
)
#: In a corpus of chats: the number of the turn that each token is of.
TURNS = pa.field("turns", pa.list_(pa.int16()))
QUARANTINE = pa.schema([(name, pa.string()) for name in ("document", "source", "place", "reason")])
VOCABULARY = pa.schema([("token_id", pa.int32()), ("piece", pa.string())])
ROW_INDEX = pa.schema([("first_row", pa.int64())])

REBUILD = "remove that folder and build the corpus again: the same sources give the same bytes"


#: What the keys of the vocabulary and of the list of bad documents begin with.
VOCABULARY_STEM = "vocab"
QUARANTINE_STEM = "quarantine"

#: A copy of that list for people, who cannot know its checksum.
QUARANTINE_COPY = "quarantine.parquet"


def sequences_schema(metadata: Sequence[str], chats: bool = False) -> pa.Schema:
    """Return the schema of a corpus's sequences: ``SEQUENCES``, of chats their turns, then the metadata fields."""
    turns = [TURNS] if chats else []
    return pa.schema([*SEQUENCES, *turns, *(pa.field(name, LABEL) for name in metadata)])


def sequence_stem(split: str, first: int) -> str:
    """Return what the key of the file begins with whose first sequence is ``first``."""
    return f"sequences/{split}-{first:010d}"


def write_by_content(store: Store, stem: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> dict[str, ObjectRecord]:
    """Store tables as ``<stem>-<crc32c>.parquet``; return its record by its key.

    Builds of other extent, text or software thus never replace an object that a stored ``corpus.json`` lists.
    """
    data = _encode(schema, tables)
    record = ObjectRecord(nbytes=data.nbytes, crc32c=crc32c(data))
    key = f"{stem}-{record.crc32c:08x}.parquet"
    store.write(key, data)
    return {key: record}


def write_parquet(store: Store, key: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Store tables as one Parquet object."""
    store.write(key, _encode(schema, tables))


def _encode(schema: pa.Schema, tables: Iterable[pa.Table]) -> memoryview:
    """Return tables as Parquet, a row group each; zstd, with checksums of the pages."""
    sink = pa.BufferOutputStream()
    dictionaries = [field.name for field in schema if field.name == "document" or field.type == LABEL]
    with pq.ParquetWriter(
        sink, schema, compression="zstd", use_dictionary=dictionaries, write_page_checksum=True
    ) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, len(table)))
    return memoryview(sink.getvalue())


def open_parquet(stream: BinaryIO | io.RawIOBase, schema: pa.Schema) -> pq.ParquetFile:
    """Open a Parquet file of that schema; pages are compared with their checksums as they are read.

    Raises ``ValueError`` or an error of Arrow for anything else: call it inside ``reading``.
    """
    file = pq.ParquetFile(stream, page_checksum_verification=True)
    if not file.schema_arrow.equals(schema):
        raise ValueError(f"its columns are {file.schema_arrow.names}, not {schema.names} of their types")
    return file


@contextmanager
def reading(where: str, remedy: str = REBUILD) -> Iterator[None]:
    """Turn what goes wrong with a listed object into ``MissingObjectError`` or ``CorruptObjectError``."""
    try:
        yield
    except NotFoundError as error:
        raise MissingObjectError(f"{where} is absent, but the corpus lists it; {remedy}") from error
    except (OSError, pa.ArrowException, ValueError, LookupError) as error:
        # Arrow's own complaints carry no errno; a disk's or a network's do, and say nothing about the data.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorruptObjectError(f"{where} is damaged ({error}); {remedy}") from error


def flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
    """Return a list column's values end to end and their offsets [n + 1] from 0."""
    lists = column.combine_chunks()
    offsets = lists.offsets.to_numpy()
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def to_sequences(table: pa.Table) -> list[TokenSequence]:
    """Return the sequences of a table of a ``sequences_schema``; arrays are views of it."""
    tokens, offsets = flat(table["tokens"])
    roles, role_offsets = flat(table["roles"])
    if not np.array_equal(offsets, role_offsets):
        raise ValueError("tokens and roles differ in length")
    lists = ["tokens", "roles"]
    turns = None
    # A corpus without chats may have a metadata field of that name.
    if TURNS in table.schema:
        lists.append(TURNS.name)
        turns, turn_offsets = flat(table[TURNS.name])
        if not np.array_equal(offsets, turn_offsets):
            raise ValueError("tokens and turns differ in length")
    scalars = table.drop_columns(lists).to_pylist()
    metadata = [name for name in table.column_names if name not in (*SEQUENCES.names, *lists)]
    return [
        TokenSequence(
            index=row["sequence"],
            tokens=tokens[start:stop],
            roles=roles[start:stop],
            turns=None if turns is None else turns[start:stop],
            document=row["document"],
            window=row["window"],
            offset=row["offset"],
            source=row["source"],
            metadata={name: row[name] for name in metadata},
        )
        for row, start, stop in zip(scalars, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]


class ObjectReader(io.RawIOBase):
    """One stored object as a file that is read by ranges."""

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key, self._at = store, key, 0
        self._nbytes = store.nbytes(key)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._nbytes}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._nbytes)
        data = self._store.read_range(self._key, self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
