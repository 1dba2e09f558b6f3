"""Runs of windows between tokenising and sorting: what a build keeps outside of memory, and takes up after a crash.

A run is one object: tables end to end, the windows of one bucket each, then the documents by id. Where each table lies
stands in the record of the part that made the run, which is stored when all its runs are. The names follow from the
part, so that doing a part twice changes nothing.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol, Self

import numpy as np
import pyarrow as pa

from actlake.ingest.corpus_parts import Part
from actlake.ingest.documents import BadDocument
from actlake.storage.arrays import crc32c
from actlake.storage.corpus import Corpus
from actlake.storage.errors import CorruptObjectError, NotFoundError
from actlake.storage.stores import Store

#: Where runs and records lie below the corpus while it is built.
BUILDING = "building"
#: Documents in one table of a run: what a merge by id reads at a time.
DOCUMENTS_PER_TABLE = 1_024

#: Row groups of a corpus whose ids make one run.
GROUPS_PER_RUN = 64

#: Documents as they are merged: ``entry`` is what the digest is over, ``origin`` the place in the order of the sources.
DOCUMENTS = pa.schema(
    [
        ("document", pa.string()),
        ("origin", pa.int64()),
        ("entry", pa.binary()),
        ("source", pa.int32()),
        ("n_tokens", pa.int64()),
        ("place", pa.string()),
    ]
)
#: The origin of a document that the corpus holds already.
PRESENT = -1


def windows_schema(metadata: Sequence[str]) -> pa.Schema:
    """Return the schema of windows: what they are sorted by, and what their sequences are made of.

    ``first`` marks the window of its document that comes first in the order; ``source`` counts the spec's sources.
    """
    fields = [
        ("key", pa.uint64()),
        ("document", pa.string()),
        ("window", pa.int32()),
        ("offset", pa.int32()),
        ("origin", pa.int64()),
        ("source", pa.int32()),
        ("first", pa.bool_()),
        ("n_text", pa.int64()),
        ("tokens", pa.list_(pa.int32())),
        ("roles", pa.list_(pa.uint8())),
        ("turns", pa.list_(pa.int16())),
    ]
    return pa.schema([*fields, *((label_column(name), pa.string()) for name in metadata)])


def label_column(field: str) -> str:
    """Return what the column of a metadata field is called, whatever the field: ``key`` is a field of some."""
    return f"label:{field}"


class Place(Protocol):
    """Where runs lie: a store, or this process's memory."""

    def read(self, key: str) -> bytes:
        """Return an object; raise ``NotFoundError`` where there is none."""

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes ``start:stop`` of an object."""

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        """Store the parts as one object."""


class Memory:
    """Runs in this process: what a small corpus needs, and what nothing is left of."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}

    def read(self, key: str) -> bytes:
        """Return an object; raise ``NotFoundError`` where there is none."""
        if key not in self._objects:
            raise NotFoundError(f"nothing at {key} in memory")
        return self._objects[key]

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Return bytes ``start:stop`` of an object."""
        return self.read(key)[start:stop]

    def write(self, key: str, *parts: bytes | memoryview) -> None:
        """Store the parts as one object."""
        self._objects[key] = b"".join(parts)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Where a table lies: bytes ``start:stop`` of a run."""

    key: str
    start: int
    stop: int
    crc32c: int

    def read(self, place: Place) -> pa.Table:
        """Return the table; raise ``CorruptObjectError`` for bytes that are not those that were written."""
        data = place.read_range(self.key, self.start, self.stop)
        if crc32c(data) != self.crc32c:
            raise CorruptObjectError(
                f"{self.key}, bytes {self.start}:{self.stop}: damaged since it was written; delete the folder "
                f"{BUILDING!r} beside it and build again"
            )
        return pa.ipc.open_stream(data).read_all()


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The windows of one bucket in one run; by source their number and their tokens of text."""

    bucket: int
    extent: Extent
    counts: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some documents of one run, by ascending id; ``first`` and ``last`` are the ids at its ends."""

    extent: Extent
    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """What is known of a part that is done.

    ``tokens_by_source`` are the documents' tokens by the number of their source; ``documents_by_source`` their number.
    ``seen`` are the fields that records have, ``found`` the metadata fields that documents have.
    """

    name: str
    slices: tuple[Slice, ...]
    blocks: tuple[Block, ...]
    tokens_by_source: Mapping[int, int] = field(default_factory=dict)
    documents_by_source: Mapping[int, int] = field(default_factory=dict)
    bad: tuple[BadDocument, ...] = ()
    seen: tuple[str, ...] = ()
    found: tuple[str, ...] = ()

    @property
    def n_documents(self) -> int:
        return sum(self.documents_by_source.values())

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens_by_source.values())

    def to_bytes(self) -> bytes:
        """Return the record as it is stored."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what ``to_bytes`` returned."""
        value = json.loads(data)
        slices = (
            Slice(
                bucket=item["bucket"],
                extent=Extent(**item["extent"]),
                counts={int(source): (n[0], n[1]) for source, n in item["counts"].items()},
            )
            for item in value["slices"]
        )
        blocks = (
            Block(extent=Extent(**item["extent"]), first=item["first"], last=item["last"]) for item in value["blocks"]
        )
        return cls(
            name=value["name"],
            slices=tuple(slices),
            blocks=tuple(blocks),
            tokens_by_source={int(source): n for source, n in value["tokens_by_source"].items()},
            documents_by_source={int(source): n for source, n in value["documents_by_source"].items()},
            bad=tuple(BadDocument(**item) for item in value["bad"]),
            seen=tuple(value["seen"]),
            found=tuple(value["found"]),
        )


def record_key(folder: str, part: Part) -> str:
    """Return the key of a part's record; its origins count from its number."""
    return f"{folder}/parts/{part.number:06d}-{part.name}.json"


def done(place: Place, folder: str, part: Part) -> PartRecord | None:
    """Return the record of a part, None where it is not done."""
    try:
        return PartRecord.from_bytes(place.read(record_key(folder, part)))
    except NotFoundError:
        return None


def write_tables(place: Place, key: str, tables: Iterable[pa.Table]) -> list[Extent]:
    """Store tables end to end as one object; return where each lies."""
    parts, extents, at = [], [], 0
    for table in tables:
        data = encode(table)
        extents.append(Extent(key=key, start=at, stop=at + data.nbytes, crc32c=crc32c(data)))
        parts.append(data)
        at += data.nbytes
    place.write(key, *parts)
    return extents


def encode(table: pa.Table) -> memoryview:
    """Return a table as an Arrow stream; LZ4 halves token ids at the speed of memory."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table)
    return memoryview(sink.getvalue())


def write_documents(place: Place, key: str, documents: pa.Table) -> tuple[Block, ...]:
    """Store documents by ascending id as blocks of one object."""
    ordered = documents.sort_by([("document", "ascending"), ("origin", "ascending")]).combine_chunks()
    tables = [ordered.slice(at, DOCUMENTS_PER_TABLE) for at in range(0, len(ordered), DOCUMENTS_PER_TABLE)]
    extents = write_tables(place, key, tables)
    return tuple(
        Block(extent=extent, first=table["document"][0].as_py(), last=table["document"][-1].as_py())
        for extent, table in zip(extents, tables, strict=True)
    )


def present_blocks(corpus: Corpus, n_sequences: Mapping[str, int], place: Place, folder: str) -> tuple[Block, ...]:
    """Store the ids of the documents of a corpus's first sequences as blocks, so that new ones are told from them."""
    blocks: list[Block] = []
    for split, n in n_sequences.items():
        n_groups = -(-n // corpus.sequences_per_group)
        for first in range(0, n_groups, GROUPS_PER_RUN):
            groups = range(first, min(first + GROUPS_PER_RUN, n_groups))
            names = [corpus.columns(split, group, ["document"])["document"] for group in groups]
            known = pa.chunked_array([chunk for column in names for chunk in column.chunks])
            known = known.slice(0, n - first * corpus.sequences_per_group).unique()
            columns = {"document": known, "origin": np.full(len(known), PRESENT)}
            columns |= {name: pa.nulls(len(known), DOCUMENTS.field(name).type) for name in DOCUMENTS.names[2:]}
            key = f"{folder}/present/{split}-{first:08d}"
            blocks += write_documents(place, key, pa.table(columns, schema=DOCUMENTS))
    return tuple(blocks)


def remove(store: Store) -> None:
    """Delete what a build kept, of whatever definition."""
    for folder in store.names(BUILDING):
        for kind in store.names(f"{BUILDING}/{folder}"):
            for name in store.names(f"{BUILDING}/{folder}/{kind}"):
                store.delete(f"{BUILDING}/{folder}/{kind}/{name}")
