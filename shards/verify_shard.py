"""The check of one shard: its record, objects, chunks and checksums, its rows, its statistics."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.dataset import ActivationDataset
from actlake.shards.objects import bits_dtype, check_index, check_whole, missing_object, read_statistics
from actlake.storage.arrays import ArraySpec, ShardIndex, decode_chunk
from actlake.storage.errors import CorruptObjectError, DataError, MissingObjectError, MixedShardError, NotFoundError
from actlake.storage.moments import Moments, of_shard
from actlake.storage.norms import OutlierRow
from actlake.storage.records import ShardRecord, commit_key, read_record
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.spec import ROW_COLUMNS

#: Another processor may add in another order, so equal rows give equal moments up to rounding: ~1e-13 in float64.
_TOLERANCE = 1e-9

#: Returns what the corpus says of a shard with this record: its row columns by name.
Expected = Callable[[ShardRecord], Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One damage.

    ``kind`` is ``record``, ``missing``, ``size``, ``index``, ``mixed``, ``chunk``, ``checksum``, ``rows``, ``token``,
    ``statistics`` or ``rerun``, or of no shard: ``metadata``, ``manifest`` or ``foreign``. ``shard`` is None, ``array``
    "" and ``chunk`` None where the damage is not of one of these.
    """

    kind: str
    shard: int | None
    message: str
    array: str = ""
    chunk: int | None = None


@dataclass(kw_only=True)
class Findings:
    """What was checked and found in one shard."""

    n_objects: int = 0
    n_chunks: int = 0
    n_rows: int = 0
    nbytes: int = 0
    problems: list[Problem] = field(default_factory=list)


class ShardCheck:
    """The check of one shard; ``deep`` reads its objects whole, ``expected`` is then compared with the row columns."""

    def __init__(self, dataset: ActivationDataset, shard: int, deep: bool, expected: Expected | None = None) -> None:
        self.store, self.spec, self.shard, self.deep = dataset.store, dataset.spec, shard, deep
        self.expected = expected
        self.where = f"{dataset.url}: shard {shard}"
        self.found = Findings()

    def run(self) -> Findings:
        """Check everything; damage is collected, never raised."""
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
                self._check_moments(point, rows, kept, moments.get(point), record)
        self.found.n_rows, self.found.nbytes = record.n_rows, record.nbytes
        return self.found

    def _problem(self, kind: str, message: str, array: str = "", chunk: int | None = None) -> None:
        problem = Problem(kind=kind, shard=self.shard, array=array, chunk=chunk, message=message)
        self.found.problems.append(problem)

    def _check_record(self, record: ShardRecord) -> bool:
        where = f"{self.store.url}/{commit_key(self.shard)}"
        if record.dataset_id != self.spec.dataset_id:
            self._problem("record", f"{where} is of dataset {record.dataset_id[:12]}...")
            return False
        first, limit = self.shard * self.spec.rows_per_shard, self.spec.rows_per_shard
        if record.first_row != first or not 0 <= record.n_void <= record.n_rows <= limit or record.n_rows == 0:
            self._problem(
                "record",
                f"{where} says rows {record.first_row} to {record.first_row + record.n_rows}, {record.n_void} void; "
                f"the shard begins at row {first} and holds 1 to {limit}",
            )
            return False
        return True

    def _statistics(self, record: ShardRecord) -> dict[str, Moments] | None:
        try:
            return read_statistics(self.store, record, self.spec)
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
        found = {name: column for name, column in columns.items() if column is not None}
        if self.expected is not None and found:
            self._check_against_corpus(found, self.expected(record))
        if len(found) < len(columns):
            return None
        kept = np.asarray(found["role"] != ROLE_VOID)
        if (n_void := int((~kept).sum())) != record.n_void:
            self._problem("rows", f"{self.where}: {n_void} void rows, its record says {record.n_void}", "rows/role")
        if self.expected is None:
            self._check_plausible(found, kept)
        return kept

    def _check_against_corpus(
        self, found: Mapping[str, npt.NDArray[Any]], expected: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        gone = expected["role"] == ROLE_VOID
        if "role" in found and (n_left := int((gone & (found["role"] != ROLE_VOID)).sum())):
            message = (
                f"{self.where}: {n_left} rows are of documents that were redacted from the corpus; "
                "run 'actlake corpus redact' for them again with this --dataset"
            )
            self._problem("redacted", message, "rows/role")
        for name, column in found.items():
            differs = (column != expected[name]) & ~gone
            if name == "role":
                differs &= column != ROLE_VOID
            if len(bad := np.flatnonzero(differs)):
                message = (
                    f"{self.where}: {name} of {len(bad)} rows is not the corpus's, the first at row {bad[0]}: "
                    f"{column[bad[0]]} stored, {expected[name][bad[0]]} in the corpus"
                )
                self._problem("token" if name == "token_id" else "rows", message, f"rows/{name}")

    def _check_plausible(self, found: Mapping[str, npt.NDArray[Any]], kept: npt.NDArray[np.bool_]) -> None:
        for name in ("token_id", "position", "sequence"):
            if len(negative := np.flatnonzero((found[name] < 0) & kept)):
                self._problem("rows", f"{self.where}: {name} of row {negative[0]} is negative", f"rows/{name}")
        places = np.stack([found["sequence"][kept], found["position"][kept].astype(np.int64)], axis=1)
        if (n_twice := len(places) - len(np.unique(places, axis=0))) > 0:
            message = f"{self.where}: {n_twice} rows have the sequence and position of another"
            self._problem("rows", message, "rows/position")

    def _check_moments(
        self,
        point: str,
        rows: npt.NDArray[Any],
        kept: npt.NDArray[np.bool_],
        stored: Moments | None,
        record: ShardRecord,
    ) -> None:
        if stored is None:
            self._problem("statistics", f"{self.where}: no statistics of {point}", point)
            return
        values, numbers = rows.view(self.spec.arrays()[point].numpy_dtype), record.first_row + np.flatnonzero(kept)
        found = of_shard(values if kept.all() else values[kept], numbers=numbers)
        if found.n_nonfinite:
            self._problem("rows", f"{self.where}, {point}: {found.n_nonfinite} rows hold values not finite", point)
        elif differs := list(_differences(stored, found, record.n_void)):
            message = f"{self.where}, {point}: the statistics are not those of the rows: {', '.join(differs)}"
            self._problem("statistics", message, point)


def _differences(stored: Moments, found: Moments, n_void: int) -> Iterator[str]:
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
    if stored.n_nonfinite is not None and not 0 <= stored.n_nonfinite <= n_void:
        yield f"n_nonfinite {stored.n_nonfinite} stored, of {n_void} void rows"
    yield from _norm_differences(stored, found)


def _norm_differences(stored: Moments, found: Moments) -> Iterator[str]:
    # What an earlier actlake stored lacks them. A row whose norm lies within rounding of a bin's edge, where another
    # processor may put it into the next, is one in 1e12.
    if stored.norm_histogram is not None and found.norm_histogram is not None:
        left, right = stored.norm_histogram, found.norm_histogram
        if not (np.array_equal(left.bins, right.bins) and np.array_equal(left.counts, right.counts)):
            yield f"norm_counts of {left.count} norms stored, of {right.count} others found"
    if stored.outlier_rows is not None and found.outlier_rows is not None:
        one, other = ([item.norm for item in rows] for rows in (stored.outlier_rows, found.outlier_rows))
        if len(one) != len(other) or not np.allclose(one, other, rtol=_TOLERANCE, atol=0):
            yield "outlier_norms differ"
        elif _clearly(stored.outlier_rows) != _clearly(found.outlier_rows):
            yield "outlier_rows differ"


def _clearly(outliers: tuple[OutlierRow, ...]) -> set[int]:
    """Return the rows that no rounding puts beyond the end of the list."""
    return {item.row for item in outliers if item.norm > outliers[-1].norm * (1 + _TOLERANCE)}
