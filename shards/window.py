"""One window of a stream: its chunks decoded by threads, each dealt to the batches in flight while it is in the cache.

A chunk is decoded into a scratch of its thread and copied in stripes (``shards.order``). Gathering rows from a large
buffer instead would halve the speed.
"""

import math
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.batch import Slot
from actlake.shards.objects import REMEDY, ShardReader, bits_dtype
from actlake.shards.order import I64, Deal, Snapshot, Units
from actlake.shards.prefetch import Workers
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import CorruptObjectError
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.spec import ROW_COLUMNS

_COLUMNS = tuple(f"rows/{name}" for name in ROW_COLUMNS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Units on their way into the batches in flight.

    ``units`` are numbers into the dealer's; ``filled`` rows of the first slot are of the window before. Row columns are
    gathered in ``columns``, unit by unit, each from its ``first_row`` on.
    """

    units: I64
    first_row: I64
    plan: Deal
    slots: list[Slot]
    filled: int
    columns: dict[str, npt.NDArray[Any]]


class Dealer:
    """Decodes the units of a snapshot and deals their rows to slots. Thread-safe once ``find_voids`` has returned."""

    def __init__(self, reader: ShardReader, points: tuple[str, ...], snapshot: Snapshot) -> None:
        self.reader, self.points, self.snapshot = reader, points, snapshot
        self.arrays: dict[str, ArraySpec] = {name: reader.arrays[name] for name in (*points, *_COLUMNS)}
        # It divides the shard, since each of the chunk sizes does.
        self.rows_per_unit = math.lcm(*(self.arrays[point].rows_per_chunk for point in points))
        self.units = Units.of(snapshot, self.rows_per_unit)
        self._shard_rows = dict(zip(snapshot.shard.tolist(), snapshot.n_rows.tolist(), strict=True))
        #: Rows of each unit that are not void, int64 [U]; right once ``find_voids`` has returned.
        self.kept_U = self.units.n_rows.copy()
        self._kept: dict[int, I64] = {}
        self._scratch = threading.local()

    @property
    def nbytes_per_row(self) -> int:
        """Bytes of a row in a batch."""
        return 8 + sum(array.nbytes_per_row for array in self.arrays.values())

    @property
    def unit_ids(self) -> I64:
        """Number of each unit in the planned row space, int64 [U]."""
        rows = self.units.shard * self.reader.spec.rows_per_shard + self.units.start
        return rows // self.rows_per_unit

    def find_voids(self, workers: Workers) -> None:
        """Find the rows to leave out; only shards with void rows are read.

        Raises ``CorruptObjectError`` where a shard has another number of void rows than its record says.
        """
        shards = self.snapshot.shard[self.snapshot.n_void > 0].tolist()
        for shard, role in zip(shards, workers.map(self._roles, shards), strict=True):
            for unit in np.flatnonzero(self.units.shard == shard).tolist():
                start, n_rows = int(self.units.start[unit]), int(self.units.n_rows[unit])
                self._kept[unit] = np.flatnonzero(role[start : start + n_rows] != ROLE_VOID)
                self.kept_U[unit] = len(self._kept[unit])

    def begin(self, units: I64, plan: Deal, slots: list[Slot], filled: int) -> Window:
        """Return a window with memory for its row columns."""
        first_row = np.cumsum(np.append(0, self.kept_U[units]))
        n_rows = int(first_row[-1])
        columns = {name: np.empty(n_rows, dtype=self.arrays[name].numpy_dtype) for name in _COLUMNS}
        columns["row"] = np.empty(n_rows, dtype=np.int64)
        return Window(units=units, first_row=first_row, plan=plan, slots=slots, filled=filled, columns=columns)

    def start(self, window: Window, workers: Workers) -> "list[Future[None]]":
        """Start the window's tasks: for each unit one a hook point, and one for its row columns."""
        places = np.flatnonzero(np.diff(window.plan.first_piece)).tolist()
        tasks = [(window, place, name) for place in places for name in (*self.points, "")]
        return [workers.submit(self._run, task) for task in tasks]

    def finish(self, window: Window) -> None:
        """Deal the row columns, once all tasks are done: a gather a batch, since stripes of them would be tiny."""
        size, n_rows = len(window.slots[0].rows["row"]) if window.slots else 1, window.plan.n_rows
        for number, slot in enumerate(window.slots):
            low, high = (min(max(edge * size, window.filled), window.filled + n_rows) for edge in (number, number + 1))
            taken = window.plan.taken[low - window.filled : high - window.filled]
            for name, column in window.columns.items():
                np.take(column, taken, out=slot.rows[name][low - number * size : high - number * size], mode="clip")

    def _run(self, task: tuple[Window, int, str]) -> None:
        window, place, point = task
        if point:
            self._deal(window, place, point)
        else:
            self._gather(window, place)

    def _deal(self, window: Window, place: int, point: str) -> None:
        rows = self._decode(point, int(window.units[place]))
        for source, batch, target, length in window.plan.of_unit(place):
            window.slots[batch].rows[point][target : target + length] = rows[source : source + length]

    def _gather(self, window: Window, place: int) -> None:
        unit, target = int(window.units[place]), slice(*window.first_row[place : place + 2].tolist())
        for name in _COLUMNS:
            window.columns[name][target] = self._decode(name, unit)
        stored = int(self.units.shard[unit]) * self.reader.spec.rows_per_shard + int(self.units.start[unit])
        rows = np.arange(stored, stored + int(self.units.n_rows[unit]), dtype=np.int64)
        window.columns["row"][target] = rows[self._kept[unit]] if unit in self._kept else rows

    def _decode(self, name: str, unit: int) -> npt.NDArray[Any]:
        shard, start, n_rows = (int(a[unit]) for a in (self.units.shard, self.units.start, self.units.n_rows))
        rows = self._read(self.arrays[name], shard, start, start + n_rows)
        return rows[self._kept[unit]] if unit in self._kept else rows

    def _read(self, array: ArraySpec, shard: int, start: int, stop: int) -> npt.NDArray[Any]:
        step = array.rows_per_chunk
        first = start // step * step
        rows = self._memory(array, -(-(stop - first) // step) * step)
        self.reader.read_rows(array, shard, first, stop, rows)
        return rows[start - first : stop - first]

    def _memory(self, array: ArraySpec, n_rows: int) -> npt.NDArray[Any]:
        nbytes = n_rows * array.nbytes_per_row
        memory: npt.NDArray[np.uint8] | None = getattr(self._scratch, "memory", None)
        if memory is None or memory.nbytes < nbytes:
            memory = self._scratch.memory = np.empty(nbytes, dtype=np.uint8)
        return memory[:nbytes].view(bits_dtype(array)).reshape(array.shape(n_rows))

    def _roles(self, shard: int) -> npt.NDArray[Any]:
        n_rows = self._shard_rows[shard]
        role = self._read(self.arrays["rows/role"], shard, 0, n_rows).copy()
        expected = self.reader.record(shard).n_void
        if (found := int((role == ROLE_VOID).sum())) != expected:
            raise CorruptObjectError(
                f"{self.reader.store.url}: shard {shard} has {found} void rows, its record says {expected}; {REMEDY}"
            )
        return role
