"""Where the columns of a manifest lie: in memory, in commits, in a group of 1,024, or in the index of 64 groups.

Everything is read by column, at need, and nothing stays open.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.manifest_files import (
    SCALARS,
    SCHEMA,
    SIZES,
    group_key,
    open_footer,
    read_columns,
    sizes_by_array,
    to_records,
    to_table,
)
from actlake.storage.records import GROUP_SHARDS, ShardRecord, read_record, read_records
from actlake.storage.stores import Store

#: The columns that planning a run reads: what is kept of a group whose commits are too many to keep.
_OPENING = ("shard", "n_rows", "n_void", "nbytes", "dataset_id")

#: Every group there can be.
ALL_GROUPS = range(2**63 // GROUP_SHARDS)


class Part(Protocol):
    """Committed shards that follow each other in a manifest. All raise ``NotFoundError`` or ``CorruptObjectError``."""

    def read(self, names: Sequence[str]) -> pa.Table:
        """Return columns of ``SCALARS``."""

    def sizes(self, arrays: Sequence[str]) -> pa.Table:
        """Return the stored bytes of arrays, int64 by shard; null where a shard has no such object."""

    def tables(self, groups: range) -> Iterator[pa.Table]:
        """Yield all columns, a table for each of these groups that is here."""

    def record(self, shard: int) -> ShardRecord:
        """Return the record of a shard that is here."""


class Rows:
    """Commits of a group as a table."""

    def __init__(self, group: int, table: pa.Table) -> None:
        self.group, self._table = group, table

    def read(self, names: Sequence[str]) -> pa.Table:
        return self._table.select(names)

    def sizes(self, arrays: Sequence[str]) -> pa.Table:
        return sizes_by_array(self._table, arrays)

    def tables(self, groups: range) -> Iterator[pa.Table]:
        if self.group in groups:
            yield self._table

    def record(self, shard: int) -> ShardRecord:
        place = self._table["shard"].to_numpy().searchsorted(shard)
        return next(to_records(self._table.slice(place, 1)))


class LooseGroup:
    """The commits of a group that is not compacted, read at first use; with ``keep`` they are read once."""

    def __init__(self, store: Store, group: int, shards: Sequence[int], *, keep: bool = True) -> None:
        self.group, self.shards, self._store, self._keep = group, shards, store, keep
        # All columns, or those that every opening asks for.
        self._kept: pa.Table | None = None

    @classmethod
    def listed(cls, store: Store, group: int, shards: Sequence[int], *, keep: bool) -> Self:
        """Read the commits that a listing named, less those that are gone again."""
        table = to_table(read_records(store, shards, skip_absent=True))
        found = cls(store, group, table["shard"].to_pylist(), keep=keep)
        found._take(table)
        return found

    def read(self, names: Sequence[str]) -> pa.Table:
        if self._kept is not None and set(names) <= set(self._kept.column_names):
            return self._kept.select(names)
        return self._all().select(names)

    def sizes(self, arrays: Sequence[str]) -> pa.Table:
        return sizes_by_array(self._all(), arrays)

    def tables(self, groups: range) -> Iterator[pa.Table]:
        if self.group in groups:
            yield self._all()

    def record(self, shard: int) -> ShardRecord:
        if not self._keep:
            return read_record(self._store, shard)
        return Rows(self.group, self._all()).record(shard)

    def _all(self) -> pa.Table:
        if self._kept is not None and self._keep:
            return self._kept
        table = to_table(read_records(self._store, self.shards))
        self._take(table)
        return table

    def _take(self, table: pa.Table) -> None:
        self._kept = table if self._keep else table.select(_OPENING).combine_chunks()


class GroupFile:
    """A compacted group."""

    def __init__(self, store: Store, group: int) -> None:
        self.group, self._store, self._key = group, store, group_key(group)
        self._shards = range(group * GROUP_SHARDS, (group + 1) * GROUP_SHARDS)

    def read(self, names: Sequence[str]) -> pa.Table:
        footer = open_footer(self._store, self._key, SCHEMA.names, self._shards)
        return read_columns(self._store, self._key, footer, names, self._shards)

    def sizes(self, arrays: Sequence[str]) -> pa.Table:
        return sizes_by_array(self.read(["objects"]), arrays)

    def tables(self, groups: range) -> Iterator[pa.Table]:
        if self.group in groups:
            yield self.read(SCHEMA.names)

    def record(self, shard: int) -> ShardRecord:
        # The commit is a hundredth of the group, and shards are read in no order.
        return read_record(self._store, shard)


class IndexFile:
    """One object of the index of a finished dataset; ``parts`` have what it leaves out."""

    def __init__(self, store: Store, key: str, shards: range, parts: Sequence[Part]) -> None:
        self._store, self._key, self._shards, self._parts = store, key, shards, parts

    @cached_property
    def _footer(self) -> pq.FileMetaData:
        # Of 160 columns: to parse it takes as long as to read four of them.
        return open_footer(self._store, self._key, SCALARS, self._shards)

    def read(self, names: Sequence[str]) -> pa.Table:
        return read_columns(self._store, self._key, self._footer, names, self._shards)

    def sizes(self, arrays: Sequence[str]) -> pa.Table:
        return self.read([SIZES + array for array in arrays]).rename_columns(list(arrays))

    def tables(self, groups: range) -> Iterator[pa.Table]:
        for part in self._parts:
            yield from part.tables(groups)

    def record(self, shard: int) -> ShardRecord:
        return read_record(self._store, shard)
