"""From the captured rows of a shard to its stored objects: statistics, void rows, encoding, uploads."""

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.ingest.workshop import Workshop
from actlake.storage.arrays import ArraySpec, crc32c, encode_shard
from actlake.storage.errors import DataError
from actlake.storage.moments import Moments, of_shard, to_parquet
from actlake.storage.records import ObjectRecord, stats_key
from actlake.storage.stores import Store

Memory = Mapping[str, npt.NDArray[Any]]

#: Rows that are looked at together.
_PIECE_ROWS = 1024


@dataclass
class Timing:
    """Seconds spent, and padded tokens run, for one shard.

    ``forward_s`` is what the model was busy for; ``encode_s`` and ``write_s`` are summed over objects, several of
    which are encoded and written at once.
    """

    forward_s: float = 0.0
    encode_s: float = 0.0
    write_s: float = 0.0
    n_tokens: int = 0


class Statistics:
    """The statistics of a shard's hook points, and which of its rows are void because a value is not finite."""

    def __init__(self, shard: int, first_row: int, redacted: npt.NDArray[np.bool_], arrays: Mapping[str, ArraySpec]):
        self._shard, self._first, self._arrays = shard, first_row, arrays
        self._redacted = redacted
        #: Rows [R] that are not finite at one of the hook points seen so far.
        self.found = np.zeros_like(redacted)
        self._moments: dict[str, Moments] = {}
        self._n_nonfinite: dict[str, int] = {}

    @property
    def void(self) -> npt.NDArray[np.bool_]:
        """All rows [R] that hold nothing."""
        return self._redacted | self.found

    def measure(self, memory: Memory, workshop: Workshop, *, void_nonfinite: bool) -> bool:
        """Measure the hook points of a pass and make their void rows zeros; say whether rows became void by it.

        Raises ``DataError`` for rows that are not finite, unless they are to become void.
        """
        for point, rows in memory.items():
            # Known to be void by another pass: their values count all the same, as they do in a single pass.
            self._n_nonfinite.setdefault(point, int((~self._finite(point, rows[self.found])).sum()))
            rows[self.void] = 0
        moments = self._measured(memory, workshop)
        bad = {point: found.n_nonfinite for point, found in moments.items() if found.n_nonfinite}
        if bad and not void_nonfinite:
            point, n_bad = next(iter(bad.items()))
            raise DataError(
                f"shard {self._shard}, {point}: {n_bad} of {len(self.found)} rows hold non-finite values, so do "
                f"{len(bad) - 1} other hook points; capture.void_nonfinite = true makes them void rows"
            )
        if bad:
            for point in bad:
                self._n_nonfinite[point] += bad[point] or 0
                self.found |= ~self._finite(point, memory[point])
            for rows in memory.values():
                rows[self.void] = 0
            moments = self._measured(memory, workshop)
        self._moments |= moments
        return bool(bad)

    def to_parquet(self, points: Iterable[str]) -> bytes:
        """Return the statistics file; the numbers of bad rows stay known, though zeros are stored for them."""
        return to_parquet({name: replace(self._moments[name], n_nonfinite=self._n_nonfinite[name]) for name in points})

    def _measured(self, memory: Memory, workshop: Workshop) -> dict[str, Moments]:
        kept = np.flatnonzero(~self.void)
        return {point: self._of(point, rows, kept, workshop) for point, rows in memory.items()}

    def _of(self, point: str, bits: npt.NDArray[Any], kept: npt.NDArray[np.int64], workshop: Workshop) -> Moments:
        rows, numbers = bits.view(self._arrays[point].numpy_dtype), self._first + kept
        if len(kept) and kept[-1] == len(kept) - 1:
            return of_shard(rows[: len(kept)], workshop.encoders.map, numbers)
        return of_shard(rows, workshop.encoders.map, numbers, kept)

    def _finite(self, point: str, bits: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        rows = bits.view(self._arrays[point].numpy_dtype)
        found = np.empty(len(rows), dtype=np.bool_)
        # By pieces: a whole hook point in float32 would be twice the memory that it was given.
        for start in range(0, len(rows), _PIECE_ROWS):
            piece = slice(start, start + _PIECE_ROWS)
            found[piece] = np.isfinite(rows[piece].astype(np.float32)).all(axis=1)
        return found


def store_arrays(
    store: Store, shard: int, arrays: Iterable[ArraySpec], memory: Memory, workshop: Workshop, timing: Timing
) -> dict[str, ObjectRecord]:
    """Encode and store a shard's rows of some arrays, several at once; return their records by name.

    Where one fails, those that are under way are waited for, the others are not begun, and its error is raised.
    """
    waiting, found = iter(arrays), dict[str, ObjectRecord]()
    under_way: dict[Future[tuple[ObjectRecord, float, float]], str] = {}
    try:
        while True:
            for array in _up_to(waiting, workshop.n_uploads - len(under_way)):
                one = workshop.uploaders.submit(_store_array, store, shard, array, memory[array.name], workshop)
                under_way[one] = array.name
            if not under_way:
                return found
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                name = under_way.pop(done)
                found[name], encode_s, write_s = done.result()
                timing.encode_s += encode_s
                timing.write_s += write_s
    finally:
        for future in under_way:
            future.cancel()
        wait(under_way)


def _up_to(items: Iterable[ArraySpec], n: int) -> list[ArraySpec]:
    return [item for _, item in zip(range(n), items, strict=False)]


def _store_array(
    store: Store, shard: int, array: ArraySpec, bits: npt.NDArray[Any], workshop: Workshop
) -> tuple[ObjectRecord, float, float]:
    start = time.perf_counter()
    encoded = encode_shard(array, bits.view(array.numpy_dtype), workshop.encoders.map)
    middle = time.perf_counter()
    store.write(array.object_key(shard), *encoded.parts)
    record = ObjectRecord(nbytes=encoded.nbytes, crc32c=encoded.crc32c, index_crc32c=encoded.index_crc32c)
    return record, middle - start, time.perf_counter() - middle


def store_statistics(store: Store, shard: int, data: bytes, timing: Timing) -> ObjectRecord:
    """Store a shard's statistics file."""
    start = time.perf_counter()
    store.write(stats_key(shard), data)
    timing.write_s += time.perf_counter() - start
    return ObjectRecord(nbytes=len(data), crc32c=crc32c(data))
