"""One window of a stream: its chunks decoded by threads, each dealt to the batches in flight while it is in the cache.

A chunk is dealt in stripes (``shards.order``) by compiled code in one go (``shards.dealing``). Where that cannot be, it
is decoded into a scratch of its thread and copied, or decoded straight into a batch that takes all of it. Gathering
rows from a large buffer instead would halve the speed.
"""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from actlake.shards.columns import WindowColumns
from actlake.shards.counters import Counters
from actlake.shards.dealing import Decoder, can_deal, make_decoder
from actlake.shards.memory import Slot
from actlake.shards.objects import bits_dtype
from actlake.shards.order import I64, Move, Scatter, Snapshot, Units
from actlake.shards.prefetch import Workers, thread_count
from actlake.shards.source import Source, read_column
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import DataError


class Plan(Protocol):
    """Where the kept rows of a window's units go."""

    @property
    def n_rows(self) -> int:
        """Rows that go into batches."""

    def of_unit(self, unit: int) -> Sequence[Move | Scatter]:
        """Return the moves of the window's unit number ``unit``."""

    def table_of(self, unit: int) -> I64 | None:
        """Return the same as int64 [M, 5]; None where there are scatters."""

    def taken(self) -> I64:
        """Return int64 [n_rows]: where each row that is put out comes among the kept rows of all units."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Units on their way into the batches in flight.

    ``units`` are numbers into the dealer's, ``kept`` the rows of each that are chosen and not void; ``addresses`` say
    where each slot is, for the names that compiled code deals. ``damaged`` are those of the window's units that could
    not be read, where that is allowed.
    """

    units: I64
    plan: Plan
    slots: Sequence[Slot]
    columns: WindowColumns
    kept: I64
    addresses: dict[str, npt.NDArray[np.uint64]]
    damaged: set[int]

    @cached_property
    def run(self) -> list[int]:
        """For each slot, how many slots from it on are neighbours in memory."""
        return _runs(self.slots)

    def is_damaged(self, low: int, high: int) -> npt.NDArray[np.bool_]:
        """Return bool [n]: which of the rows put out from ``low`` to ``high`` could not be read."""
        first_kept = np.cumsum(self.kept) - self.kept
        place = np.searchsorted(first_kept, self.columns.taken[low:high], side="right") - 1
        return np.isin(place, sorted(self.damaged))


class Dealer:
    """Decodes the units of a snapshot and deals their rows to slots. Thread-safe once ``kept_U`` is known."""

    def __init__(self, source: Source, snapshot: Snapshot, counters: Counters, *, skip_damaged: bool = False) -> None:
        self.source, self.snapshot, self.counters = source, snapshot, counters
        self.rows_per_unit = source.rows_per_unit
        self.units = Units.of(snapshot, self.rows_per_unit)
        self._kept: dict[int, npt.NDArray[np.uint8]] = {}
        self._skip_damaged = skip_damaged
        self._scratch = threading.local()
        self._dealt = [name for name, array in source.arrays.items() if can_deal(array)]
        self._wanted: set[str] = set()

    @property
    def unit_ids(self) -> I64:
        """Number of each unit in the planned row space, int64 [U]."""
        rows = self.units.shard * self.source.spec.rows_per_shard + self.units.start
        return rows // self.rows_per_unit

    @cached_property
    def kept_U(self) -> I64:
        """Rows of each unit that are chosen and not void, int64 [U].

        At first use the shards whose records count void rows are read, all of them where there is a filter.
        """
        kept_U = self.units.n_rows.copy()
        shards = np.flatnonzero((self.snapshot.n_void > 0) | (self.source.filter is not None)).tolist()
        if not shards:
            return kept_U
        with Workers(thread_count(self.source.local)) as workers:
            for index, kept in zip(shards, workers.map(self._chosen, shards), strict=True):
                shard = int(self.snapshot.shard[index])
                for unit in range(*np.searchsorted(self.units.shard, [shard, shard + 1]).tolist()):
                    start, n_rows = int(self.units.start[unit]), int(self.units.n_rows[unit])
                    mine = kept[start : start + n_rows]
                    kept_U[unit] = int(mine.sum())
                    if kept_U[unit] < n_rows:
                        self._kept[unit] = np.packbits(mine)
        return kept_U

    def _chosen(self, index: int) -> npt.NDArray[np.bool_]:
        shard, n_rows = int(self.snapshot.shard[index]), int(self.snapshot.n_rows[index])
        kept = np.ones(n_rows, dtype=bool)
        if self.source.filter is not None:
            kept &= self.source.filter.mask(shard, 0, n_rows)
        if self.snapshot.n_void[index]:
            kept &= ~self.source.voids(shard, n_rows)
        return kept

    def begin(self, units: I64, plan: Plan, slots: Sequence[Slot]) -> Window:
        """Return a window; nothing is read yet."""
        damaged: set[int] = set()
        return Window(
            units=units,
            plan=plan,
            slots=slots,
            columns=WindowColumns(len(units), plan.taken, partial(self._read_column, units, damaged), self._wanted),
            kept=self.kept_U[units],
            addresses={name: np.array([slot.address(name) for slot in slots], np.uint64) for name in self._dealt},
            damaged=damaged,
        )

    def start(self, window: Window, workers: Workers) -> "list[Future[None]]":
        """Start the window's tasks: for each unit one a hook point, and one for each row column in demand."""
        tasks = [(window, places, name) for places in self._neighbours(window) for name in self.source.points]
        columns = [workers.submit(self._load, (window, name)) for name in sorted(self._wanted)]
        deal = self._deal if self.source.local else partial(self._deal_remote, workers.turns)
        return workers.share(deal, tasks) + columns

    def _neighbours(self, window: Window) -> list[list[int]]:
        """Return the places of a window's units in groups that are read together.

        From a local disk each unit is read on its own. Of an object store those that lie side by side come by one
        request, as far as one may go.
        """
        if self.source.local:
            return [[place] for place in range(len(window.units))]
        limit = min(reader.store.limits.range_nbytes for reader in self.source.readers)
        widest = max(array.nbytes_per_row for array in self.source.arrays.values())
        most = max(1, limit // (self.rows_per_unit * widest))
        groups: list[list[int]] = []
        for place in np.argsort(window.units, kind="stable").tolist():
            unit = int(window.units[place])
            last = int(window.units[groups[-1][-1]]) if groups else -2
            beside = unit == last + 1 and self.units.shard[unit] == self.units.shard[last]
            if beside and len(groups[-1]) < most:
                groups[-1].append(place)
            else:
                groups.append([place])
        # In the order in which the stream has them: the first batches are waited for first.
        return sorted(groups, key=min)

    def _deal(self, task: tuple[Window, list[int], str]) -> None:
        window, places, name = task
        for place in places:
            self._deal_unit(window, place, name)

    def _deal_remote(self, turns: AbstractContextManager[Any], task: tuple[Window, list[int], str]) -> None:
        # Many threads wait for bytes, few decode them.
        window, places, name = task
        held = self._fetch(window, places, name)
        with turns:
            for place in places:
                self._deal_unit(window, place, name, held)

    def _fetch(self, window: Window, places: list[int], name: str) -> dict[int, memoryview] | None:
        reader, array = self.source.points[name]
        wanted = [place for place in places if place not in window.damaged and window.plan.of_unit(place)]
        units = sorted(int(window.units[place]) for place in wanted)
        spans = [(int(self.units.start[unit]), int(self.units.start[unit] + self.units.n_rows[unit])) for unit in units]
        try:
            return reader.fetch(array, int(self.units.shard[units[0]]), spans) if units else None
        except DataError:
            # Which of the units it is shows when each is read.
            return None

    def _deal_unit(self, window: Window, place: int, name: str, held: dict[int, memoryview] | None = None) -> None:
        if place in window.damaged:
            return
        unit = int(window.units[place])
        begun = time.perf_counter()
        try:
            if self._deal_at_once(window, place, name, held):
                self.counters.unit(time.perf_counter() - begun, 0.0)
                return
            moves = window.plan.of_unit(place)
            if not moves:
                return
            straight = self._straight(window, unit, moves, name)
            rows = self._decode(name, unit, straight, held)
        except DataError as error:
            if not self._skip_damaged:
                raise
            window.damaged.add(place)
            self.counters.damage(int(self.units.shard[unit]), error)
            return
        decoded = time.perf_counter()
        if straight is None:
            for move in moves:
                _put(window, name, rows, move)
        self.counters.unit(decoded - begun, time.perf_counter() - decoded)

    def _deal_at_once(self, window: Window, place: int, name: str, held: dict[int, memoryview] | None) -> bool:
        # By compiled code, and whether that was done: where anything is unusual, the longer way says what.
        unit, addresses = int(window.units[place]), window.addresses.get(name)
        moves = None if addresses is None or unit in self._kept else window.plan.table_of(place)
        if addresses is None or moves is None:
            return False
        if not len(moves):
            return True
        reader, array = self.source.points[name]
        shard, start, n_rows = (int(a[unit]) for a in (self.units.shard, self.units.start, self.units.n_rows))
        step, batch_rows = array.rows_per_chunk, window.slots[0].slab.arrays[name].shape[1]
        shape = step, n_rows, batch_rows, array.nbytes_per_row, array.numpy_dtype.itemsize
        decoder = self._decoder()
        for first in range(0, n_rows, step):
            stored = reader.stored(array, shard, (start + first) // step, held)
            if stored is None or not decoder.deal(*stored, shape, first, moves, addresses):
                return False
        return True

    def _decoder(self) -> Decoder:
        scratch = self._scratch.__dict__
        if "decoder" not in scratch:
            scratch["decoder"] = make_decoder()
        found: Decoder = scratch["decoder"]
        return found

    def _load(self, task: tuple[Window, str]) -> None:
        window, name = task
        try:
            window.columns.load(name)
        except DataError:
            # Whether those rows are left out is known once the window is decoded; if not, `gather` raises this again.
            if not self._skip_damaged:
                raise

    def _straight(
        self, window: Window, unit: int, moves: Sequence[Move | Scatter], name: str
    ) -> npt.NDArray[Any] | None:
        # A batch's memory, where it takes all rows of a unit one after another.
        if len(moves) > 1 or isinstance(moves[0], Scatter):
            return None
        source, batch, target, length, count = moves[0]
        n_rows = int(self.units.n_rows[unit])
        whole = n_rows % self.source.arrays[name].rows_per_chunk == 0 and unit not in self._kept
        if not whole or count > 1 or source or length != n_rows:
            return None
        return window.slots[batch].rows(name)[target : target + length]

    def _decode(
        self, name: str, unit: int, out: npt.NDArray[Any] | None, held: dict[int, memoryview] | None
    ) -> npt.NDArray[Any]:
        reader, array = self.source.points[name]
        shard, start, n_rows = (int(a[unit]) for a in (self.units.shard, self.units.start, self.units.n_rows))
        if out is None:
            step = array.rows_per_chunk
            out = self._memory(array, -(-n_rows // step) * step)
        reader.read_rows(array, shard, start, start + n_rows, out, held)
        return self._only_kept(unit, out[:n_rows])

    def _read_column(self, units: I64, damaged: set[int], name: str, place: int) -> npt.NDArray[Any]:
        unit = int(units[place])
        # Rows that are left out need no columns, which may be lost as well.
        return np.zeros(self.kept_U[unit], np.uint8) if place in damaged else self._column(name, unit)

    def _column(self, name: str, unit: int) -> npt.NDArray[Any]:
        shard, start, n_rows = (int(a[unit]) for a in (self.units.shard, self.units.start, self.units.n_rows))
        if name == "row":
            first = shard * self.source.spec.rows_per_shard + start
            return self._only_kept(unit, np.arange(first, first + n_rows, dtype=np.int64))
        return self._only_kept(unit, read_column(self.source.columns, name, shard, start, start + n_rows))

    def kept(self, unit: int) -> npt.NDArray[np.bool_]:
        """Return bool [n]: which of a unit's stored rows are chosen and not void."""
        n_rows = int(self.units.n_rows[unit])
        if unit not in self._kept:
            return np.ones(n_rows, dtype=bool)
        return np.unpackbits(self._kept[unit], count=n_rows).view(bool)

    def _only_kept(self, unit: int, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return rows[self.kept(unit)] if unit in self._kept else rows

    def _memory(self, array: ArraySpec, n_rows: int) -> npt.NDArray[Any]:
        # One a thread; the arrays that it is seen as are kept with it, as they cost as much as reading a small chunk.
        scratch, kind = self._scratch.__dict__, (array.dtype, array.width, n_rows)
        if kind not in scratch.setdefault("views", {}):
            nbytes = n_rows * array.nbytes_per_row
            if "memory" not in scratch or scratch["memory"].nbytes < nbytes:
                scratch.update(memory=np.empty(nbytes, dtype=np.uint8), views={})
            rows = scratch["memory"][:nbytes].view(bits_dtype(array)).reshape(array.shape(n_rows))
            scratch["views"][kind] = rows
        found: npt.NDArray[Any] = scratch["views"][kind]
        return found


def _put(window: Window, name: str, rows: npt.NDArray[Any], move: Move | Scatter) -> None:
    if isinstance(move, Scatter):
        window.slots[move.batch].rows(name)[move.target] = rows[move.source]
        return
    source, batch, target, length, count = move
    while count:
        n = min(count, window.run[batch])
        slot = window.slots[batch]
        part = rows[source : source + n * length]
        into = slot.slab.arrays[name][slot.place : slot.place + n, target : target + length]
        into[...] = part.reshape(into.shape)
        source, batch, count = source + n * length, batch + n, count - n


def _runs(slots: Sequence[Slot]) -> list[int]:
    run = [1] * len(slots)
    for place in range(len(slots) - 2, -1, -1):
        here, after = slots[place], slots[place + 1]
        if here.slab is after.slab and after.place == here.place + 1:
            run[place] = run[place + 1] + 1
    return run
