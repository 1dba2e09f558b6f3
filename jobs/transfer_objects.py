"""Moving single objects between stores: read once, compared with what is recorded of them, written whole."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from actlake.shards.objects import REMEDY, bits_dtype, check_index, check_whole, missing_object
from actlake.storage.arrays import ArraySpec, ShardIndex, crc32c, decode_chunk, encode_shard
from actlake.storage.errors import CorruptObjectError, NotFoundError
from actlake.storage.moments import from_parquet, to_parquet
from actlake.storage.records import ObjectRecord, ShardRecord, stats_key
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

#: The name of a shard's statistics where the others are arrays.
STATISTICS = "statistics"

#: Bytes of one ranged read: larger ones cost the client up to three times the CPU a byte.
_RANGE_NBYTES = 8 << 20


class Budget:
    """Bytes that several threads may hold at a time; one object that is larger has it to itself."""

    def __init__(self, nbytes: int) -> None:
        self._limit, self._used, self._changed = nbytes, 0, threading.Condition()

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait until there is room, and keep it while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


def fetch(store: Store, key: str, expected: ObjectRecord, where: str) -> memoryview:
    """Return a whole object, read by ranges and compared with its record.

    Raises ``MissingObjectError`` or ``CorruptObjectError`` naming ``where``.
    """
    # One byte more than there should be: an object that goes on is found out.
    view, n_read = memoryview(bytearray(expected.nbytes + 1)), 0
    try:
        while n_read < len(view):
            left = len(view) - n_read
            # No read of that one byte alone: beyond the end some stores answer with an error.
            wanted = left if left <= _RANGE_NBYTES + 1 else _RANGE_NBYTES
            found = store.read_into(key, n_read, view[n_read : n_read + wanted])
            n_read += found
            if found < wanted:
                break
    except NotFoundError as error:
        raise missing_object(where) from error
    check_whole(view[:n_read], expected, where)
    return view[:n_read]


class ShardCopier:
    """Copies the objects of shards into a dataset whose spec has the same hook points, or fewer of them.

    Objects are copied as they are. Two things depend on which hook points there are: the statistics, of which rows are
    left out, and the row columns, whose chunks follow the largest of any hook point. Both become what a build of the
    smaller dataset would have written. Thread-safe.
    """

    def __init__(self, source: Store, target: Store, old: DatasetSpec, new: DatasetSpec) -> None:
        self.source, self.target, self.old, self.new = source, target, old.arrays(), new.arrays()
        self.points = new.point_names
        self.all_points = old.point_names == new.point_names

    def is_verbatim(self, name: str) -> bool:
        """Say whether an array, or ``STATISTICS``, is copied byte for byte."""
        return self.all_points if name == STATISTICS else self.old[name] == self.new[name]

    def same(self, record: ShardRecord, there: ShardRecord) -> bool:
        """Say whether the shard that the target has is that of the source, by what is copied byte for byte.

        The revision is not looked at: a shard that was repaired counts from 0 again, and holds the same.
        """
        fields = ("shard", "first_row", "n_rows", "n_void")
        names = [name for name in self.new if self.is_verbatim(name)]
        return (
            all(getattr(record, field) == getattr(there, field) for field in fields)
            and all(record.objects.get(name) == there.objects.get(name) for name in names)
            and (not self.all_points or record.stats == there.stats)
        )

    def copy(self, record: ShardRecord, name: str) -> ObjectRecord:
        """Copy one object of a shard; return what its new record says of it.

        Raises ``DataError`` where it is not what the record of the source says.
        """
        where = f"{self.source.url}: shard {record.shard}, {name}"
        if name == STATISTICS:
            return self._copy_statistics(record, where)
        array, key = self.old[name], self.old[name].object_key(record.shard)
        expected = record.objects.get(name)
        data = memoryview(b"") if expected is None else fetch(self.source, key, expected, where)
        index = check_index(self.source, array, record, bytes(data[-array.index_nbytes :]), where)
        if expected is not None and self.is_verbatim(name):
            self.target.write(key, data)
            return expected
        return self._encode_anew(name, record, data, index, where)

    def _encode_anew(
        self, name: str, record: ShardRecord, data: memoryview, index: ShardIndex, where: str
    ) -> ObjectRecord:
        rows = _decoded(self.old[name], data, index, record.n_rows, where)
        encoded = encode_shard(self.new[name], rows)
        self.target.write(self.new[name].object_key(record.shard), *encoded.parts)
        return ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)

    def _copy_statistics(self, record: ShardRecord, where: str) -> ObjectRecord:
        key = stats_key(record.shard)
        data = fetch(self.source, key, record.stats, where)
        if self.all_points:
            self.target.write(key, data)
            return record.stats
        try:
            moments = from_parquet(
                bytes(data), {name: array.width or 1 for name, array in self.old.items() if array.width}
            )
        except ValueError as error:
            raise CorruptObjectError(f"{where}: no statistics of these hook points ({error}); {REMEDY}") from error
        kept = to_parquet({name: moments[name] for name in self.points})
        self.target.write(key, kept)
        return ObjectRecord(nbytes=len(kept), crc32c=crc32c(kept))


def _decoded(array: ArraySpec, data: memoryview, index: ShardIndex, n_rows: int, where: str) -> Any:
    """Return the rows of a shard object, ``[n_rows, width]`` of the array's dtype."""
    size = array.rows_per_chunk
    n_chunks = -(-n_rows // size)
    rows = np.empty(array.shape(n_chunks * size), dtype=bits_dtype(array))
    for chunk in range(n_chunks):
        start, length = int(index.offsets[chunk]), int(index.lengths[chunk])
        piece = data[start : start + length]
        decode_chunk(array, piece, rows[chunk * size : (chunk + 1) * size], f"{where}, chunk {chunk}")
    return rows[:n_rows].view(array.numpy_dtype)
