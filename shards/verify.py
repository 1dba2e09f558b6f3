"""Checks every committed byte of a dataset, and makes damaged shards invisible so that they are built again."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.dataset import ActivationDataset
from actlake.shards.objects import bits_dtype, check_index, check_whole, missing_object, read_statistics
from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.arrays import ArraySpec, ShardIndex, decode_chunk
from actlake.storage.errors import CorruptObjectError, DataError, MissingObjectError, MixedShardError, NotFoundError
from actlake.storage.manifest import uncommit
from actlake.storage.moments import Moments, of_shard
from actlake.storage.records import ShardRecord, commit_key, read_record
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.spec import ROW_COLUMNS

#: Another processor may add in another order, so equal rows give equal moments up to rounding: ~1e-13 in float64.
_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One damage.

    ``kind`` is ``record``, ``missing``, ``size``, ``index``, ``mixed``, ``chunk``, ``checksum``, ``rows`` or
    ``statistics``; ``array`` is "" and ``chunk`` None where the damage is not of one array or chunk.
    """

    kind: str
    shard: int
    message: str
    array: str = ""
    chunk: int | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was checked, what was found, and which planned shards are not there to be checked."""

    n_shards: int
    n_objects: int
    n_chunks: int
    n_rows: int
    nbytes: int
    problems: tuple[Problem, ...]
    missing_shards: tuple[int, ...]

    @property
    def bad_shards(self) -> tuple[int, ...]:
        """The shards with a problem, ascending."""
        return tuple(sorted({problem.shard for problem in self.problems}))


@dataclass(kw_only=True)
class _Findings:
    n_objects: int = 0
    n_chunks: int = 0
    n_rows: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)


def verify(
    dataset: ActivationDataset, *, on_progress: Callable[[int], None] | None = None, deep: bool = True
) -> VerifyReport:
    """Check every shard that was committed when the dataset was opened; damage is collected, never raised.

    Each record, object, shard index, chunk and checksum, the row columns, and the statistics against the rows. Without
    ``deep`` only records, sizes and shard indexes: a few small reads an object. ``on_progress`` hears of stored bytes
    as their shards are done; their sum is that of the manifest's ``nbytes``. The held-out split is a dataset of its
    own.
    """
    shards = dataset.reader.manifest.shards
    total = _Findings()
    with Workers(thread_count(dataset.store.local)) as workers:
        for found in workers.map(lambda shard: _ShardCheck(dataset, shard, deep).run(), shards):
            total.n_objects += found.n_objects
            total.n_chunks += found.n_chunks
            total.n_rows += found.n_rows
            total.nbytes += found.nbytes
            total.problems += found.problems
            if on_progress is not None:
                on_progress(found.nbytes)
    return VerifyReport(
        n_shards=len(shards),
        n_objects=total.n_objects,
        n_chunks=total.n_chunks,
        n_rows=total.n_rows,
        nbytes=total.nbytes,
        problems=tuple(total.problems),
        missing_shards=tuple(dataset.missing_shards),
    )


def repair(dataset: ActivationDataset, report: VerifyReport) -> tuple[int, ...]:
    """Make the damaged shards of a report invisible, so that the next ingestion builds them; return them."""
    for shard in report.bad_shards:
        uncommit(dataset.store, shard)
    return report.bad_shards


class _ShardCheck:
    """The check of one shard."""

    def __init__(self, dataset: ActivationDataset, shard: int, deep: bool) -> None:
        self.store, self.spec, self.shard, self.deep = dataset.store, dataset.spec, shard, deep
        self.where = f"{dataset.url}: shard {shard}"
        self.found = _Findings()

    def run(self) -> _Findings:
        try:
            # Not the manifest's: another attempt may have committed since it was read.
            record = read_record(self.store, self.shard)
        except (NotFoundError, CorruptObjectError) as error:
            self._problem("record", f"{error}")
            return self.found
        if not self._check_record(record):
            return self.found
        moments = self._statistics(record)
        arrays = self.spec.arrays()
        columns = {name: self._check_array(arrays[f"rows/{name}"], record) for name in ROW_COLUMNS}
        kept = self._check_columns(columns, record)
        for point in self.spec.point_names:
            rows = self._check_array(arrays[point], record)
            if rows is not None and kept is not None and moments is not None:
                self._check_moments(point, rows, kept, moments.get(point))
        self.found.n_rows, self.found.nbytes = record.n_rows, record.nbytes
        return self.found

    def _problem(self, kind: str, message: str, array: str = "", chunk: int | None = None) -> None:
        problem = Problem(kind=kind, shard=self.shard, array=array, chunk=chunk, message=message)
        self.found.problems.append(problem)

    def _check_record(self, record: ShardRecord) -> bool:
        where = f"{self.store.url}/{commit_key(self.shard)}"
        n_problems = len(self.found.problems)
        if record.dataset_id != self.spec.dataset_id:
            self._problem("record", f"{where} is of dataset {record.dataset_id[:12]}...")
        first, limit = self.shard * self.spec.rows_per_shard, self.spec.rows_per_shard
        if record.first_row != first or not 0 <= record.n_void <= record.n_rows <= limit or record.n_rows == 0:
            self._problem(
                "record",
                f"{where} says rows {record.first_row} to {record.first_row + record.n_rows}, {record.n_void} void; "
                f"the shard begins at row {first} and holds 1 to {limit}",
            )
        return len(self.found.problems) == n_problems

    def _statistics(self, record: ShardRecord) -> dict[str, Moments] | None:
        try:
            return read_statistics(self.store, record)
        except DataError as error:
            kind = "missing" if isinstance(error, MissingObjectError) else "statistics"
            self._problem(kind, f"{error}")
            return None

    # --- one object ---

    def _check_array(self, array: ArraySpec, record: ShardRecord) -> npt.NDArray[Any] | None:
        """Check one object; return its rows where all of them could be decoded and ``deep`` asks for them."""
        where = f"{self.where}, {array.name}"
        self.found.n_objects += 1
        try:
            data = self._read(array)
            index = check_index(self.store, array, record, data[-array.index_nbytes :], where)
        except NotFoundError:
            self._problem("missing", f"{missing_object(where)}", array.name)
        except MixedShardError as error:
            self._problem("mixed", f"{error}", array.name)
        except CorruptObjectError as error:
            self._problem("index", f"{error}", array.name)
        else:
            if self.deep:
                return self._check_chunks(array, record, data, index)
            nbytes, expected = self.store.nbytes(array.object_key(self.shard)), record.objects[array.name].nbytes
            if nbytes != expected:
                self._problem("size", f"{where}: {nbytes} bytes, its record says {expected}", array.name)
        return None

    def _read(self, array: ArraySpec) -> bytes:
        key = array.object_key(self.shard)
        return self.store.read(key) if self.deep else self.store.read_range(key, -array.index_nbytes, 0)

    def _check_chunks(
        self, array: ArraySpec, record: ShardRecord, data: bytes, index: ShardIndex
    ) -> npt.NDArray[Any] | None:
        size = array.rows_per_chunk
        n_chunks = -(-record.n_rows // size)
        rows = np.empty(array.shape(n_chunks * size), dtype=bits_dtype(array))
        whole = True
        for chunk in range(n_chunks):
            where = f"{self.where}, {array.name}, chunk {chunk}"
            start, length = int(index.offsets[chunk]), int(index.lengths[chunk])
            self.found.n_chunks += 1
            try:
                piece = memoryview(data)[start : start + length]
                decode_chunk(array, piece, rows[chunk * size : (chunk + 1) * size], where)
            except CorruptObjectError as error:
                self._problem("chunk", f"{error}", array.name, chunk)
                whole = False
        if not whole:
            return None
        try:
            check_whole(data, record.objects[array.name], f"{self.where}, {array.name}")
        except CorruptObjectError as error:
            # Sound chunks under the record's index: bytes beside them, or a record that is wrong in itself. (An object
            # of another attempt has the same crc32c where its chunks have the same lengths, since each ends with its
            # own; there the statistics tell.)
            kind = "size" if len(data) != record.objects[array.name].nbytes else "checksum"
            self._problem(kind, f"{error}", array.name)
        return rows[: record.n_rows]

    # --- rows ---

    def _check_columns(
        self, columns: dict[str, npt.NDArray[Any] | None], record: ShardRecord
    ) -> npt.NDArray[np.bool_] | None:
        """Check what the row columns say; return bool [n]: the rows that are not void."""
        token_id, position, sequence, role = (columns[name] for name in ("token_id", "position", "sequence", "role"))
        if token_id is None or position is None or sequence is None or role is None:
            return None
        kept = np.asarray(role != ROLE_VOID)
        if (n_void := int((~kept).sum())) != record.n_void:
            self._problem("rows", f"{self.where}: {n_void} void rows, its record says {record.n_void}", "rows/role")
        for name, column in (("token_id", token_id), ("position", position), ("sequence", sequence)):
            if len(negative := np.flatnonzero((column < 0) & kept)):
                self._problem("rows", f"{self.where}: {name} of row {negative[0]} is negative", f"rows/{name}")
        places = np.stack([sequence[kept], position[kept].astype(np.int64)], axis=1)
        if (n_twice := len(places) - len(np.unique(places, axis=0))) > 0:
            message = f"{self.where}: {n_twice} rows have the sequence and position of another"
            self._problem("rows", message, "rows/position")
        return kept

    def _check_moments(
        self, point: str, rows: npt.NDArray[Any], kept: npt.NDArray[np.bool_], stored: Moments | None
    ) -> None:
        values = rows.view(self.spec.arrays()[point].numpy_dtype)
        found = of_shard(values if kept.all() else values[kept])
        if stored is None:
            self._problem("statistics", f"{self.where}: no statistics of {point}", point)
        elif differs := list(_differences(stored, found)):
            message = f"{self.where}, {point}: the statistics are not those of the rows: {', '.join(differs)}"
            self._problem("statistics", message, point)


def _differences(stored: Moments, found: Moments) -> Iterator[str]:
    if stored.count != found.count:
        yield f"count {stored.count} stored, {found.count} found"
        return
    squares = found.m2 + found.count * found.mean**2
    if not math.isclose(stored.norm_mean, found.norm_mean, rel_tol=_TOLERANCE):
        yield f"norm_mean {stored.norm_mean!r} stored, {found.norm_mean!r} found"
    for name, limit in (("mean", np.sqrt(squares / max(1, found.count))), ("m2", squares)):
        off = np.abs(getattr(stored, name) - getattr(found, name))
        # A NaN is off as well.
        if len(bad := np.flatnonzero(~(off <= _TOLERANCE * limit))):
            yield f"{name} of channel {bad[0]} off by {off[bad[0]]:.3g}"
