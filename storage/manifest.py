"""All committed records as Arrow columns: the only answer to "what is in this dataset".

Full groups of 1,024 commits are compacted into ``manifest/<group>.parquet``, of determined name and bytes, so that any
driver may write it. ``root.json``, written when a run is complete, lists them and an index of their columns: such a
dataset opens without listing, and in a second where it has a million shards. ``summaries`` writes both.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.storage.errors import DataError, NotFoundError, UncommittedShardError
from actlake.storage.groups import (
    commit_groups,
    commits_of,
    compacted_groups,
    groups_of_index,
    n_groups,
    shards_of,
    shards_of_index,
)
from actlake.storage.html import table_html
from actlake.storage.manifest_files import REMEDY, SCHEMA, group_key, sum_sizes, to_records, to_table
from actlake.storage.manifest_parts import ALL_GROUPS, GroupFile, IndexFile, LooseGroup, Part, Rows
from actlake.storage.records import GROUP_SHARDS, ShardRecord
from actlake.storage.rowspace import RowSpace
from actlake.storage.stores import Store
from actlake.storage.summaries import compact, read_root, short_groups, uncommit, write_root

__all__ = ["SCHEMA", "Manifest", "compact", "group_key", "read_root", "uncommit", "write_root"]

I64 = npt.NDArray[np.int64]

#: What opening reads of every shard: 32 bytes.
_CORE = ("shard", "n_rows", "n_void", "nbytes")

#: Parts that are read at once; those that are not compacted read 16 commits at once each.
_N_PARTS = 4

#: Groups that are not compacted whose records are kept, of 1,024 commits at 40 bytes an object: those of more are read
#: again when they are asked for. A run compacts each group as it is whole, so that few are not.
_KEPT_GROUPS = 32


class Manifest:
    """The committed shards at one moment, immutable and thread-safe; other columns are read when they are asked for.

    Where the dataset was changed since that moment, what is read late may be gone: ``DataError``.
    """

    def __init__(
        self, parts: Sequence[Part], totals: Mapping[str, int] | None = None, also: Sequence[str] = ()
    ) -> None:
        self._parts, self._totals = parts, totals
        names = (*_CORE, *also)
        # Read at once: it finds out whether everything that is listed is still there.
        tables = _read_parts(parts, names)
        self._ends: I64 = np.cumsum([len(table) for table in tables], dtype=np.int64)
        core = _concatenate(tables, names)
        self._known: dict[str, pa.ChunkedArray] = dict(zip(names, core.columns, strict=True))
        self._shard = self.numbers("shard")

    def __len__(self) -> int:
        return len(self._shard)

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> Self:
        """Build from records in any order."""
        return cls(_in_memory(sorted(records, key=lambda record: record.shard)))

    @classmethod
    def load(cls, store: Store, n_rows: int | None = None, also: Sequence[str] = ()) -> Self:
        """Read the compacted groups and the other commits of a dataset, with ``n_rows`` planned where that is known.

        The columns in ``also`` are read in the same go.
        """
        found = cls.load_finished(store, n_rows, also)
        return cls.load_listed(store, also) if found is None else found

    @classmethod
    def load_finished(cls, store: Store, n_rows: int | None = None, also: Sequence[str] = ()) -> Self | None:
        """Read what ``root.json`` counts, without a listing; None where it is not there, or not true."""
        root = read_root(store)
        if root is None or (n_rows is not None and root["n_rows"] != n_rows):
            # Other rows were left by a run that planned fewer and ended after another had planned more.
            return None
        # One listing: of the last group, the only one that is not compacted.
        if short_groups(store, root):
            return None
        try:
            return cls(_finished_parts(store, root), root.get("nbytes_by_array"), also)
        except NotFoundError:
            return None  # A commit that the totals count is gone, as after a repair: what is there is the answer.

    @classmethod
    def of_groups(cls, store: Store, groups: Iterable[int], also: Sequence[str] = ()) -> Self:
        """Read compacted groups alone, ascending."""
        return cls([GroupFile(store, group) for group in groups], also=also)

    @classmethod
    def load_listed(cls, store: Store, also: Sequence[str] = ()) -> Self:
        """Read what is there by listing it, whatever ``root.json`` says."""
        compacted = compacted_groups(store)
        loose = sorted(set(commit_groups(store)).difference(compacted))
        keep = len(loose) <= _KEPT_GROUPS
        parts: list[GroupFile | LooseGroup] = [GroupFile(store, group) for group in compacted]
        parts += [LooseGroup.listed(store, group, commits_of(store, group), keep=keep) for group in loose]
        parts.sort(key=lambda part: part.group)
        return cls([part for part in parts if not isinstance(part, LooseGroup) or part.shards], also=also)

    # --- columns ---

    @property
    def table(self) -> pa.Table:
        """Every column of every shard; ``objects`` takes 40 bytes of memory an object, so prefer ``columns``."""
        return self.columns(*SCHEMA.names)

    def columns(self, *names: str) -> pa.Table:
        """Return some columns of ``SCHEMA``, one row a shard, ascending."""
        if missing := [name for name in names if name not in self._known]:
            with _unchanged():
                read = _concatenate(list(self._read(missing)), missing)
            self._known.update(zip(missing, read.columns, strict=True))
        return pa.table([self._known[name] for name in names], schema=_schema(names))

    def numbers(self, name: str) -> I64:
        """Return an int64 column; unlike ``to_numpy`` without pandas, whose import takes 2 s of a core."""
        return _numbers_of(self.columns(name)[name])

    def sizes(self, *arrays: str) -> pa.Table:
        """Return ``shard``, and the stored bytes of some arrays, one row a shard; null where one has no such object."""
        with _unchanged():
            tables = [part.sizes(arrays) for part in self._parts]
        found = pa.concat_tables(tables or [pa.schema([(name, pa.int64()) for name in arrays]).empty_table()])
        return found.add_column(0, "shard", self._known["shard"])

    def tables(self, groups: range = ALL_GROUPS) -> Iterator[pa.Table]:
        """Yield every column, a table for each group of 1,024 shards: all at once may not fit into memory."""
        with _unchanged():
            for part in self._parts:
                yield from part.tables(groups)

    @cached_property
    def shards(self) -> list[int]:
        """Numbers of the committed shards, ascending."""
        numbers: list[int] = self._shard.tolist()
        return numbers

    @cached_property
    def n_rows(self) -> int:
        """Committed rows, voids included."""
        return int(pc.sum(self._known["n_rows"]).as_py() or 0)

    @cached_property
    def nbytes(self) -> int:
        """Stored bytes of all arrays."""
        return int(pc.sum(self._known["nbytes"]).as_py() or 0)

    def n_rows_by_shard(self) -> dict[int, int]:
        """Return the committed number of rows of each shard, whatever dataset its record names."""
        return dict(zip(self.shards, self._known["n_rows"].to_pylist(), strict=True))

    def missing(self, space: RowSpace, dataset_id: str | None = None) -> list[int]:
        """Return the shards of a row space that are not committed, or with fewer rows than it plans; ascending.

        With ``dataset_id``, records of other datasets do not count.
        """
        found: list[int] = self.missing_numbers(space, dataset_id).tolist()
        return found

    def missing_numbers(self, space: RowSpace, dataset_id: str | None = None) -> I64:
        """Return what ``missing`` does as an array: 8 bytes a shard."""
        counted = self._shard < space.n_shards
        if dataset_id is not None:
            ids = self.columns("dataset_id")["dataset_id"]
            # Not where all are the same: a comparison with a text makes pyarrow import pandas.
            if any(found != dataset_id for found in pc.unique(ids).to_pylist()):
                counted &= _numbers_of(pc.equal(ids, dataset_id).cast(pa.int64())).astype(np.bool_)
        n_rows = np.zeros(space.n_shards, dtype=np.int64)
        n_rows[self._shard[counted]] = self.numbers("n_rows")[counted]
        return np.flatnonzero(n_rows < space.n_rows_by_shard())

    def is_exactly(self, space: RowSpace) -> bool:
        """Say whether the shards of a row space are committed, each with the planned rows, and no others."""
        return len(self) == space.n_shards and np.array_equal(self.numbers("n_rows"), space.n_rows_by_shard())

    def nbytes_by_array(self) -> dict[str, int]:
        """Return the stored bytes of each array."""
        if self._totals is not None:
            return dict(self._totals)
        found: Counter[str] = Counter()
        for table in self.tables():
            found.update(sum_sizes(table))
        return dict(found)

    def _repr_html_(self) -> str:
        by_array = sorted(self.nbytes_by_array().items(), key=lambda item: -item[1])
        rows = {
            "shards": f"{len(self):,}",
            "rows": f"{self.n_rows:,}",
            "stored": f"{self.nbytes / 1e9:,.3f} GB in {len(by_array)} arrays; the largest:",
        }
        return table_html("Manifest", rows | {name: f"{nbytes / 1e9:,.3f} GB" for name, nbytes in by_array[:8]})

    # --- records ---

    def record(self, shard: int) -> ShardRecord:
        """Return the record of one shard; raise ``UncommittedShardError`` where it has none.

        Raises ``DataError`` where it has other rows than the manifest says: row numbers would be wrong.
        """
        place = int(np.searchsorted(self._shard, shard))
        if place == len(self) or self._shard[place] != shard:
            raise UncommittedShardError(
                f"shard {shard} is not committed; 'actlake ingest' with the dataset's job file builds what is missing"
            )
        part = self._parts[int(np.searchsorted(self._ends, place, side="right"))]
        try:
            record = part.record(shard)
        except NotFoundError as error:
            raise UncommittedShardError(
                f"shard {shard} has lost its commit record since the dataset was opened; "
                "'actlake ingest' with the dataset's job file builds what is missing"
            ) from error
        if record.n_rows != (n_rows := self._known["n_rows"][place].as_py()):
            raise DataError(
                f"shard {shard} has {record.n_rows} rows by its commit record and {n_rows} by the manifest: open the "
                f"dataset again if it has been rebuilt since; else {REMEDY}"
            )
        return record

    def records(self) -> Iterator[ShardRecord]:
        """Yield every record, ascending."""
        for table in self.tables():
            yield from to_records(table)

    # --- reading ---

    def _read(self, names: Sequence[str]) -> Iterator[pa.Table]:
        if "objects" not in names:
            yield from _read_parts(self._parts, names)
            return
        for part in self._parts:
            yield from (table.select(names) for table in part.tables(ALL_GROUPS))


# --- What there is to read -----------------------------------------------------------------------------------------


def _finished_parts(store: Store, root: Mapping[str, Any]) -> Sequence[Part]:
    n_shards, compacted = root["n_shards"], set(root["groups"])
    parts = [
        GroupFile(store, group) if group in compacted else LooseGroup(store, group, shards_of(group, n_shards))
        for group in range(n_groups(n_shards))
    ]
    if "index" not in root:
        return parts
    return [
        IndexFile(
            store,
            key,
            shards_of_index(number, n_shards),
            [parts[group] for group in groups_of_index(number) if group < len(parts)],
        )
        for number, key in enumerate(root["index"])
    ]


def _read_parts(parts: Sequence[Part], names: Sequence[str]) -> list[pa.Table]:
    """Read columns of parts, some at once; raise what the first in their order raised."""
    if len(parts) < 2:
        return [part.read(names) for part in parts]
    with ThreadPoolExecutor(_N_PARTS, thread_name_prefix="actlake-manifest") as pool:
        return list(pool.map(lambda part: part.read(names), parts))


def _in_memory(records: Iterable[ShardRecord]) -> list[Rows]:
    """Return ascending records as parts."""
    tables = {
        group: to_table(found) for group, found in groupby(records, key=lambda record: record.shard // GROUP_SHARDS)
    }
    return [Rows(group, table) for group, table in tables.items()]


def _schema(names: Sequence[str]) -> pa.Schema:
    return pa.schema([SCHEMA.field(name) for name in names])


def _concatenate(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    if not tables:
        # Not ``empty_table``, which makes arrays of lists: pyarrow imports pandas for that, as for combining nothing.
        return pa.Table.from_batches([], _schema(names))
    whole = pa.concat_tables(tables)
    # Lists of objects of a million shards do not fit into one array.
    return whole if "objects" in names else whole.combine_chunks()


def _numbers_of(column: pa.ChunkedArray) -> I64:
    """Return an int64 column without nulls."""
    if not len(column):
        return np.zeros(0, dtype=np.int64)
    array = column.combine_chunks()
    return np.frombuffer(array.buffers()[1], dtype=np.int64, count=len(array), offset=8 * array.offset)


@contextmanager
def _unchanged() -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise DataError(f"the dataset was changed since it was opened ({error}); open it again") from error
