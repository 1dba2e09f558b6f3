"""Reads and decodes chunks of committed shards, and proves that each object belongs to its shard's commit record.

Chunk checksums cannot see an object of one attempt beside one of another. So on the first touch of an object the
checksum of its shard index is compared with the commit record. Where they differ the record is read once more, since
another attempt may have committed meanwhile; where they still differ, ``MixedShardError``.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from actlake.storage.arrays import CRC_NBYTES, ArraySpec, ShardIndex, check_chunk, crc32c, decode_chunk
from actlake.storage.errors import (
    CorruptObjectError,
    DataError,
    MissingObjectError,
    MixedShardError,
    NotFoundError,
    UncommittedShardError,
)
from actlake.storage.manifest import Manifest
from actlake.storage.moments import Moments, from_parquet
from actlake.storage.records import ObjectRecord, ShardRecord, read_record, stats_key
from actlake.storage.spec import DatasetSpec
from actlake.storage.stores import Store

T = TypeVar("T")

REMEDY = "run 'actlake verify --repair' on the dataset, then 'actlake ingest' rebuilds the shard"

#: Memory for shard indexes; when it is full they are forgotten, and read and compared again.
_INDEX_NBYTES = 64 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class _OpenShard:
    record: ShardRecord
    indexes: dict[str, ShardIndex] = field(default_factory=dict)


class ShardReader:
    """Chunks and statistics of the committed shards of one dataset.

    Thread-safe without locks (each step is one dict operation), therefore safe after a fork. Holds no open files; keeps
    a read buffer for each thread.
    """

    def __init__(self, store: Store, spec: DatasetSpec, manifest: Manifest) -> None:
        self.store, self.spec, self.manifest = store, spec, manifest
        self.arrays = spec.arrays()
        self._open: dict[int, _OpenShard] = {}
        self._local = threading.local()
        nbytes_per_shard = sum(array.index_nbytes + 512 for array in self.arrays.values())
        self._max_open = max(16, _INDEX_NBYTES // nbytes_per_shard)

    def record(self, shard: int) -> ShardRecord:
        """Return the newest known record of a shard; raise ``UncommittedShardError`` where it has none."""
        return self._opened(shard).record

    def read_chunk(self, array: ArraySpec, shard: int, chunk: int, out: npt.NDArray[Any]) -> None:
        """Decode one chunk into ``out``, C-contiguous ``[rows_per_chunk, width]`` of the array's dtype or its bits.

        Raises ``UncommittedShardError``, ``MissingObjectError``, ``CorruptObjectError`` or ``MixedShardError``; each
        names the shard and the array.
        """

        def read(opened: _OpenShard) -> None:
            index = self._index(array, opened)
            start, length = int(index.offsets[chunk]), int(index.lengths[chunk])
            where = self._where(shard, array.name, chunk)
            if array.codec.name == "none" and length == out.nbytes + CRC_NBYTES:
                into = out.reshape(-1).view(np.uint8).data, memoryview(bytearray(CRC_NBYTES))
                self._read_into(array, shard, start, where, *into)
                check_chunk(*into, where)
                return
            data = self._buffer(length)
            self._read_into(array, shard, start, where, data)
            decode_chunk(array, data, out, where)

        self._twice(shard, read)

    def read_rows(
        self,
        array: ArraySpec,
        shard: int,
        start: int,
        stop: int,
        out: npt.NDArray[Any],
        held: Mapping[int, memoryview] | None = None,
    ) -> None:
        """Decode the chunks of a shard's rows ``start:stop`` into ``out``.

        ``start`` is the first row of a chunk; ``out`` has room for whole chunks; ``held`` may have what ``fetch``
        returned for these rows and others. Raises as ``read_chunk``.
        """
        step = array.rows_per_chunk
        chunks = range(start // step, -(-stop // step))
        if held is None and not self.store.local and len(chunks) > 1:
            held = self.fetch(array, shard, [(start, stop)])
        for place, chunk in enumerate(chunks):
            target = out[place * step : (place + 1) * step]
            if held is not None and chunk in held:
                try:
                    decode_chunk(array, held[chunk], target, self._where(shard, array.name, chunk))
                except CorruptObjectError:
                    pass  # Another attempt may have been committed since; if not, reading it anew raises this again.
                else:
                    continue
            self.read_chunk(array, shard, chunk, target)

    def stored(
        self, array: ArraySpec, shard: int, chunk: int, held: Mapping[int, memoryview] | None = None
    ) -> tuple[bytes | memoryview, int, int] | None:
        """Return where the stored bytes of a chunk are: a local file's path, or ``held`` bytes; first byte and length.

        None where they are to be fetched. Raises as ``read_chunk`` where the shard's index cannot be read.
        """
        if held is not None:
            return (held[chunk], 0, held[chunk].nbytes) if chunk in held else None
        if not self.store.local:
            return None
        index = self._twice(shard, partial(self._index, array))
        path = os.fsencode(self.store.path(array.object_key(shard)))
        return path, int(index.offsets[chunk]), int(index.lengths[chunk])

    def fetch(self, array: ArraySpec, shard: int, spans: Sequence[tuple[int, int]]) -> dict[int, memoryview]:
        """Return the stored bytes of the chunks of row spans ``(start, stop)`` of a shard, by chunk number.

        Those that lie close together come by one request (``Store.read_ranges``). Raises as ``read_chunk``.
        """
        step = array.rows_per_chunk
        chunks = [chunk for start, stop in spans for chunk in range(start // step, -(-stop // step))]

        def read(opened: _OpenShard) -> dict[int, memoryview]:
            index = self._index(array, opened)
            places = [(start := int(index.offsets[chunk]), start + int(index.lengths[chunk])) for chunk in chunks]
            try:
                found = self.store.read_ranges(array.object_key(shard), places)
            except NotFoundError as error:
                raise missing_object(self._where(shard, array.name)) from error
            for chunk, (start, stop), data in zip(chunks, places, found, strict=True):
                if data.nbytes != stop - start:
                    where = self._where(shard, array.name, chunk)
                    raise CorruptObjectError(f"{where}: {data.nbytes} of {stop - start} bytes are there; {REMEDY}")
            return dict(zip(chunks, found, strict=True))

        return self._twice(shard, read)

    def statistics(self, shard: int) -> dict[str, Moments]:
        """Return a shard's moments by hook point; raise ``MissingObjectError`` or ``CorruptObjectError``."""

        def read(opened: _OpenShard) -> dict[str, Moments]:
            return read_statistics(self.store, opened.record, self.spec)

        return self._twice(shard, read)

    def moments(self, shard: int, point: str) -> Moments:
        """Return a shard's moments at one hook point; raises as ``statistics``."""
        found = self.statistics(shard).get(point)
        if found is None or not found.plausible:
            raise CorruptObjectError(f"{self._where(shard)}: no statistics of {point}, or no numbers; {REMEDY}")
        return found

    # --- what is known of a shard ---

    def _opened(self, shard: int) -> _OpenShard:
        opened = self._open.get(shard)
        if opened is None:
            if len(self._open) >= self._max_open:
                self._open.clear()
            opened = self._open.setdefault(shard, _OpenShard(self._own(self.manifest.record(shard))))
        return opened

    def _own(self, record: ShardRecord) -> ShardRecord:
        if record.dataset_id != self.spec.dataset_id:
            raise MixedShardError(
                f"{self._where(record.shard)}: its record is of dataset {record.dataset_id[:12]}..., this is "
                f"{self.spec.dataset_id[:12]}...; {REMEDY}"
            )
        return record

    def _twice(self, shard: int, read: Callable[[_OpenShard], T]) -> T:
        opened = self._opened(shard)
        try:
            return read(opened)
        except (CorruptObjectError, MissingObjectError):
            if not self._recommitted(opened):
                raise
        return read(self._opened(shard))

    def _recommitted(self, used: _OpenShard) -> bool:
        shard = used.record.shard
        if self._open.get(shard) is not used:
            return True
        try:
            record = self._own(read_record(self.store, shard))
        except NotFoundError as error:
            raise UncommittedShardError(
                f"{self._where(shard)} has lost its commit record since the dataset was opened; "
                "'actlake ingest' with the dataset's job file builds what is missing"
            ) from error
        if record.content == used.record.content:
            return False
        if record.n_rows != used.record.n_rows:
            raise DataError(
                f"{self._where(shard)} was rebuilt with {record.n_rows} rows and had {used.record.n_rows} when it was "
                "opened, so its rows have other numbers now; open the dataset again and start a new stream"
            )
        self._open[shard] = _OpenShard(record)
        return True

    # --- bytes ---

    def _index(self, array: ArraySpec, opened: _OpenShard) -> ShardIndex:
        index = opened.indexes.get(array.name)
        if index is None:
            shard = opened.record.shard
            tail = self._tail(array, opened.record)
            where = self._where(shard, array.name)
            index = opened.indexes[array.name] = check_index(self.store, array, opened.record, tail, where)
        return index

    def _tail(self, array: ArraySpec, record: ShardRecord) -> bytes:
        expected = record.objects.get(array.name)
        if expected is not None and not self.store.local and expected.nbytes > array.index_nbytes:
            # Not all services know ranges from the end, and to ask for the size first is another request.
            tail = self._range(array, record.shard, expected.nbytes - array.index_nbytes, expected.nbytes)
            if tail[-CRC_NBYTES:] == expected.index_crc32c.to_bytes(CRC_NBYTES, "little"):
                return tail
        return self._range(array, record.shard, -array.index_nbytes, 0)

    def _buffer(self, nbytes: int) -> memoryview:
        # One a thread, since chunks are of about one size.
        buffer: bytearray | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._local.buffer = bytearray(nbytes + nbytes // 8)
        return memoryview(buffer)[:nbytes]

    def _read_into(self, array: ArraySpec, shard: int, start: int, where: str, *into: memoryview) -> None:
        try:
            found = self.store.read_into(array.object_key(shard), start, *into)
        except NotFoundError as error:
            raise missing_object(self._where(shard, array.name)) from error
        if found != (wanted := sum(view.nbytes for view in into)):
            raise CorruptObjectError(f"{where}: {found} of {wanted} bytes are there; {REMEDY}")

    def _range(self, array: ArraySpec, shard: int, start: int, stop: int) -> bytes:
        try:
            return self.store.read_range(array.object_key(shard), start, stop)
        except NotFoundError as error:
            raise missing_object(self._where(shard, array.name)) from error

    def _where(self, shard: int, array: str = "", chunk: int | None = None) -> str:
        parts = [f"shard {shard}"] + ([array] if array else []) + ([] if chunk is None else [f"chunk {chunk}"])
        return f"{self.store.url}: {', '.join(parts)}"


def missing_object(where: str) -> MissingObjectError:
    """Return the error for a committed shard that lacks the object ``where``."""
    return MissingObjectError(f"{where}: the shard is committed, but the object is not there; {REMEDY}")


def check_index(store: Store, array: ArraySpec, record: ShardRecord, tail: bytes, where: str) -> ShardIndex:
    """Return the shard index in ``tail``, the last ``array.index_nbytes`` bytes of an object.

    Raises ``MixedShardError`` for a sound index of another attempt than the record's, ``CorruptObjectError`` else.
    """
    expected = record.objects.get(array.name)
    if expected is None:
        raise CorruptObjectError(f"{where}: the commit record names no such object; {REMEDY}")
    found = int.from_bytes(tail[-4:], "little")
    if found != expected.index_crc32c and len(tail) == array.index_nbytes and crc32c(tail[:-4]) == found:
        raise MixedShardError(
            f"{where}: the object is of another attempt than the commit record: shard index crc32c expected "
            f"{expected.index_crc32c:#010x}, found {found:#010x}; {REMEDY}"
        )
    try:
        return ShardIndex.parse(array, tail, record.n_rows, expected.nbytes, where)
    except CorruptObjectError as error:
        nbytes = store.nbytes(array.object_key(record.shard))
        size = f" ({nbytes} bytes, its record says {expected.nbytes})" if nbytes != expected.nbytes else ""
        raise CorruptObjectError(f"{error}{size}; {REMEDY}") from error


def read_statistics(store: Store, record: ShardRecord, spec: DatasetSpec) -> dict[str, Moments]:
    """Return the moments stored for a shard, by hook point.

    Raises ``MissingObjectError`` or ``CorruptObjectError`` where they are not those of the record, or of the spec.
    """
    widths = {point.name: point.width for point in spec.hook_points}
    key = stats_key(record.shard)
    where = f"{store.url}: shard {record.shard}, {key}"
    try:
        # Some 40 bytes a channel and at most 4 MiB of norms.
        data = store.read(key, 64 * sum(widths.values()) + (8 << 20) * len(widths))
    except NotFoundError as error:
        raise missing_object(where) from error
    check_whole(data, record.stats, where)
    try:
        return from_parquet(data, widths)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise CorruptObjectError(f"{where} is damaged ({error}); {REMEDY}") from error


def check_whole(data: bytes | memoryview, expected: ObjectRecord, where: str) -> None:
    """Raise ``CorruptObjectError`` where a whole object has not the size and crc32c of its record."""
    found = crc32c(data)
    if len(data) != expected.nbytes or found != expected.crc32c:
        raise CorruptObjectError(
            f"{where}: {expected.nbytes} bytes with crc32c {expected.crc32c:#010x} expected, "
            f"found {len(data)} bytes with {found:#010x}; {REMEDY}"
        )


def bits_dtype(array: ArraySpec) -> np.dtype[Any]:
    """Return the dtype in which rows are moved: numpy copies uint16 faster than the extension type bfloat16."""
    return np.dtype("<u2") if array.dtype == "bfloat16" else array.numpy_dtype
