"""All committed records as Arrow columns: the only answer to "what is in this dataset".

Full groups of 1,024 commits are compacted into ``manifest/<group>.parquet``, of determined name and bytes, so that any
driver may write it. ``root.json``, written when a run is complete, lists them and an index of their columns: such a
dataset opens without listing, and in a second where it has a million shards.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from actlake.storage.errors import CorruptObjectError, DataError, NotFoundError, UncommittedShardError
from actlake.storage.html import table_html
from actlake.storage.manifest_files import (
    ALL_GROUPS,
    INDEX_GROUPS,
    REMEDY,
    SCHEMA,
    GroupFile,
    IndexFile,
    Part,
    Rows,
    group_bytes,
    group_key,
    index_bytes,
    index_key,
    index_keys,
    sum_sizes,
    to_records,
    to_table,
)
from actlake.storage.records import GROUP_SHARDS, ShardRecord, commit_folder, commit_key, read_record
from actlake.storage.rowspace import MAX_SHARDS, RowSpace
from actlake.storage.sealed import check_seal, seal
from actlake.storage.stored_json import parse_object, require_fields
from actlake.storage.stores import Store

__all__ = ["SCHEMA", "Manifest", "compact", "group_key", "read_root", "uncommit", "write_root"]

I64 = npt.NDArray[np.int64]

#: A million groups have 10 MB of numbers.
_MAX_ROOT_NBYTES = 16 << 20

#: What opening reads of every shard: 32 bytes.
_CORE = ("shard", "n_rows", "n_void", "nbytes")


class Manifest:
    """The committed shards at one moment, immutable and thread-safe; other columns are read when they are asked for.

    Where the dataset was changed since that moment, what is read late may be gone: ``DataError``.
    """

    def __init__(self, parts: Sequence[Part], totals: Mapping[str, int] | None = None) -> None:
        self._parts, self._totals = parts, totals
        # Read at once: it finds out whether everything that is listed is still there.
        tables = [part.read(_CORE) for part in parts]
        self._ends: I64 = np.cumsum([len(table) for table in tables], dtype=np.int64)
        core = _concatenate(tables, _CORE)
        self._known: dict[str, pa.ChunkedArray] = dict(zip(_CORE, core.columns, strict=True))
        self._shard = _numbers_of(core["shard"])

    def __len__(self) -> int:
        return len(self._shard)

    @classmethod
    def of(cls, records: Iterable[ShardRecord]) -> Self:
        """Build from records in any order."""
        return cls(_in_memory(sorted(records, key=lambda record: record.shard)))

    @classmethod
    def load(cls, store: Store, n_rows: int | None = None) -> Self:
        """Read the compacted groups and the other commits of a dataset, with ``n_rows`` planned where that is known."""
        root = read_root(store)
        if root is not None and n_rows is not None and root["n_rows"] != n_rows:
            # Left by a run that planned fewer rows and ended after another had planned more.
            root = None
        # One listing: of the last group, the only one that is not compacted.
        if root is not None and not _short_groups(store, root):
            try:
                return cls(_finished_parts(store, root), root.get("nbytes_by_array"))
            except NotFoundError:
                pass  # A commit that the totals count is gone, as after a repair: what is there is the answer.
        return cls.load_listed(store)

    @classmethod
    def load_listed(cls, store: Store) -> Self:
        """Read what is there by listing it, whatever ``root.json`` says."""
        groups = _groups(store)
        parts: list[GroupFile | Rows] = [GroupFile(store, group) for group in groups]
        parts += _in_memory(_listed_records(store, set(groups)))
        parts.sort(key=lambda part: part.group)
        return cls(parts)

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

    def missing(self, space: RowSpace) -> list[int]:
        """Return the shards of a row space that are not committed, or with fewer rows than it plans; ascending."""
        n_rows = np.zeros(space.n_shards, dtype=np.int64)
        inside = self._shard < space.n_shards
        n_rows[self._shard[inside]] = _numbers_of(self._known["n_rows"])[inside]
        planned = np.minimum(space.n_rows - np.arange(space.n_shards) * space.rows_per_shard, space.rows_per_shard)
        found: list[int] = np.flatnonzero(n_rows < planned).tolist()
        return found

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
        """Return the record of one shard; raise ``UncommittedShardError`` where it has none."""
        place = int(np.searchsorted(self._shard, shard))
        if place == len(self) or self._shard[place] != shard:
            raise UncommittedShardError(
                f"shard {shard} is not committed; 'actlake ingest' with the dataset's job file builds what is missing"
            )
        part = self._parts[int(np.searchsorted(self._ends, place, side="right"))]
        try:
            return part.record(shard)
        except NotFoundError as error:
            raise UncommittedShardError(
                f"shard {shard} has lost its commit record since the dataset was opened; "
                "'actlake ingest' with the dataset's job file builds what is missing"
            ) from error

    def records(self) -> Iterator[ShardRecord]:
        """Yield every record, ascending."""
        for table in self.tables():
            yield from to_records(table)

    # --- reading ---

    def _read(self, names: Sequence[str]) -> Iterator[pa.Table]:
        for part in self._parts:
            if "objects" in names:
                yield from (table.select(names) for table in part.tables(ALL_GROUPS))
            else:
                yield part.read(names)


# --- What summarises commits ---------------------------------------------------------------------------------------
#
# One driver may write a summary while another un-commits a shard of it. So a summary is checked after it is written,
# and un-commit deletes summaries before the record and once more after it: the later of the two removes what is wrong.


def compact(store: Store, manifest: Manifest, n_shards: int, sizes: Mapping[int, int]) -> list[int]:
    """Write the groups that are full and not yet compacted; return all compacted groups.

    ``sizes`` has the planned rows of each shard. A short last shard may grow, so its group is not full.
    """
    present = set(_groups(store))
    core = manifest.columns("shard", "n_rows")
    whole = core["shard"].to_numpy()[core["n_rows"].to_numpy() == sizes.get(0, 0)]
    n_whole = Counter((whole // GROUP_SHARDS).tolist())
    full = []
    for group in range(n_shards // GROUP_SHARDS):
        # Only the last shard of all may be planned shorter than the first.
        is_full = n_whole[group] == GROUP_SHARDS and sizes[(group + 1) * GROUP_SHARDS - 1] == sizes[0]
        if is_full and (group in present or _write_group(store, manifest, group)):
            full.append(group)
    return full


def write_root(store: Store, *, dataset_id: str, n_rows: int, manifest: Manifest, groups: list[int]) -> None:
    """Write the index and ``root.json``: the totals of a complete dataset, its compacted groups and its index."""
    value: dict[str, Any] = {
        "dataset_id": dataset_id,
        "complete": True,
        "n_rows": n_rows,
        "n_shards": len(manifest),
        "nbytes": manifest.nbytes,
        "groups": groups,
        "index": index_keys(len(manifest)),
        "nbytes_by_array": manifest.nbytes_by_array(),
    }
    present = {f"manifest/{name}" for name in store.names("manifest")}
    if present.issuperset(value["index"]) and read_root(store) == value:
        return
    for number, key in enumerate(value["index"]):
        # A short one may be left of commits that were replaced since.
        if key not in present or key != index_key(number, INDEX_GROUPS * GROUP_SHARDS):
            store.write(key, index_bytes(manifest.tables(_groups_of_index(number))))
    store.write("root.json", json.dumps(seal(value), sort_keys=True, indent=1).encode())
    for group in _lost_groups(store, value):
        _delete_summaries(store, group)
    for key in present.difference(value["index"]):
        if key.startswith("manifest/index-"):
            store.delete(key)


def read_root(store: Store) -> dict[str, Any] | None:
    """Return the totals of a complete dataset, None for one in the making; raise ``CorruptObjectError`` if damaged.

    ``index`` and ``nbytes_by_array`` are absent where an early actlake wrote them.
    """
    try:
        value = check_seal(parse_object(store.read("root.json", _MAX_ROOT_NBYTES)), f"{store.url}/root.json")
        if missing := {"dataset_id", "n_rows", "n_shards", "nbytes", "groups"} - set(value):
            raise ValueError(f"fields missing: {', '.join(sorted(missing))}")
        _check_root(value)
    except NotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise CorruptObjectError(f"{store.url}/root.json is damaged ({error}); {REMEDY}") from error
    return value


@dataclass(frozen=True, kw_only=True)
class _Root:
    """The types of the totals."""

    dataset_id: str
    n_rows: int
    n_shards: int
    nbytes: int
    groups: tuple[int, ...]
    index: tuple[str, ...]
    nbytes_by_array: Mapping[str, int]


def _check_root(value: Mapping[str, Any]) -> None:
    require_fields(_Root, value)
    n_shards, groups = value["n_shards"], value["groups"]
    if not 0 <= n_shards <= MAX_SHARDS:
        raise ValueError(f"n_shards = {n_shards} is not 0 to {MAX_SHARDS}")
    if groups != sorted(set(groups)) or not set(groups) <= set(range(n_shards // GROUP_SHARDS)):
        raise ValueError("groups that there cannot be")
    if "index" in value and value["index"] != index_keys(n_shards):
        raise ValueError("keys of the index that there cannot be")
    if any(nbytes < 0 for nbytes in value.get("nbytes_by_array", {}).values()):
        raise ValueError("sizes below 0")


def uncommit(store: Store, shard: int) -> None:
    """Make a shard invisible again; what summarises it goes first, so that no reader sees the two disagree."""
    group = shard // GROUP_SHARDS
    _delete_summaries(store, group)
    store.delete(commit_key(shard))
    _delete_summaries(store, group)


def _delete_summaries(store: Store, group: int) -> None:
    store.delete("root.json")
    store.delete(index_key(group // INDEX_GROUPS, INDEX_GROUPS * GROUP_SHARDS))
    store.delete(group_key(group))


def _write_group(store: Store, manifest: Manifest, group: int) -> bool:
    """Write a group; say whether all of its commits are still there."""
    (table,) = manifest.tables(range(group, group + 1))
    store.write(group_key(group), group_bytes(table))
    if _commits(store, group) == list(_shards_of(group)):
        return True
    _delete_summaries(store, group)
    return False


def _lost_groups(store: Store, root: Mapping[str, Any]) -> list[int]:
    """Return the groups of complete totals that are no longer there, or whose commits are not."""
    return sorted(set(root["groups"]).difference(_groups(store)).union(_short_groups(store, root)))


def _short_groups(store: Store, root: Mapping[str, Any]) -> list[int]:
    """Return the groups that are not compacted and lack a commit that the totals count."""
    n_shards = root["n_shards"]
    loose = sorted(set(range(-(-n_shards // GROUP_SHARDS))).difference(root["groups"]))
    return [group for group in loose if len(_commits(store, group)) < len(_shards_of(group, n_shards))]


# --- What there is to read -----------------------------------------------------------------------------------------


def _finished_parts(store: Store, root: Mapping[str, Any]) -> Sequence[Part]:
    n_shards, compacted = root["n_shards"], set(root["groups"])
    parts = [
        GroupFile(store, group) if group in compacted else _loose(store, group, _shards_of(group, n_shards))
        for group in range(-(-n_shards // GROUP_SHARDS))
    ]
    if "index" not in root:
        return parts
    return [
        IndexFile(
            store,
            key,
            _shards_of_index(number, n_shards),
            [parts[group] for group in _groups_of_index(number) if group < len(parts)],
        )
        for number, key in enumerate(root["index"])
    ]


def _groups_of_index(number: int) -> range:
    return range(number * INDEX_GROUPS, (number + 1) * INDEX_GROUPS)


def _shards_of_index(number: int, n_shards: int) -> range:
    most = INDEX_GROUPS * GROUP_SHARDS
    return range(number * most, min((number + 1) * most, n_shards))


def _shards_of(group: int, n_shards: int | None = None) -> range:
    stop = (group + 1) * GROUP_SHARDS
    return range(group * GROUP_SHARDS, stop if n_shards is None else min(stop, n_shards))


def _loose(store: Store, group: int, shards: Iterable[int]) -> Rows:
    return Rows(group, lambda: to_table(read_record(store, shard) for shard in shards))


def _in_memory(records: Iterable[ShardRecord]) -> list[Rows]:
    """Return ascending records as parts."""
    tables = {
        group: to_table(found) for group, found in groupby(records, key=lambda record: record.shard // GROUP_SHARDS)
    }
    return [Rows(group, partial(pa.table, table)) for group, table in tables.items()]


def _listed_records(store: Store, groups: set[int]) -> Iterator[ShardRecord]:
    for folder in _numbers(store, "commits", ""):
        for shard in _commits(store, folder) if folder not in groups else ():
            try:
                yield read_record(store, shard)
            except NotFoundError:
                continue  # Un-committed since it was listed.


def _groups(store: Store) -> list[int]:
    return _numbers(store, "manifest", ".parquet")


def _commits(store: Store, group: int) -> list[int]:
    # A record in another group's folder is nobody's: its shard is read from its own place, or not there.
    return [shard for shard in _numbers(store, commit_folder(group), ".json") if shard // GROUP_SHARDS == group]


def _numbers(store: Store, folder: str, suffix: str) -> list[int]:
    # Folders in buckets may hold what no one of us wrote: marker objects, .DS_Store.
    pattern = re.compile(r"([0-9]{8}|[0-9]{10})" + re.escape(suffix))
    return [int(match[1]) for name in store.names(folder) if (match := pattern.fullmatch(name))]


def _schema(names: Sequence[str]) -> pa.Schema:
    return pa.schema([SCHEMA.field(name) for name in names])


def _concatenate(tables: Sequence[pa.Table], names: Sequence[str]) -> pa.Table:
    # An array made of a list makes pyarrow import pandas, so none is made where there are tables.
    whole = pa.concat_tables(tables or [_schema(names).empty_table()])
    # Lists of objects of a million shards do not fit into one array.
    return whole if "objects" in names else whole.combine_chunks()


def _numbers_of(column: pa.ChunkedArray) -> I64:
    """Return an int64 column without nulls; unlike ``to_numpy`` without pandas, whose import takes 2 s of a core."""
    array = column.combine_chunks()
    if not len(array):
        return np.zeros(0, dtype=np.int64)
    return np.frombuffer(array.buffers()[1], dtype=np.int64, count=len(array), offset=8 * array.offset)


@contextmanager
def _unchanged() -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise DataError(f"the dataset was changed since it was opened ({error}); open it again") from error
