"""The order of a stream, as pure functions of (seed, epoch, snapshot, batch size, units per window).

- The **snapshot** is the set of committed shards, with their rows, that the stream began on.
- A **unit** is ``rows_per_unit`` consecutive stored rows of one shard (fewer at the end of a short one): whole chunks
  of every chosen hook point, so that each chunk is decoded once an epoch. ``rows_per_unit`` is the least common
  multiple of their chunk sizes. Void rows are left out of it.
- In an epoch the units come in ascending order of the key ``mix(mix(mix(seed ^ SALT) ^ epoch) ^ id)``, ``mix`` being
  the splitmix64 step of ``storage.rowspace`` and ``id`` the number of the unit in the planned row space.
- A **window** is a run of units that is decoded together. Every unit of a window is cut into T contiguous *stripes*, T
  being the window's rows over the batch size; the window's rows are put out stripe by stripe, and in a stripe unit by
  unit. Unit u of U has its edge t at row ``floor(t * rows / T + u / U)``: where batches fill a window exactly, each
  stripe is exactly a batch (Hermite's identity), though the units' pieces differ by a row. So every batch has rows of
  all units of its window, a unit is copied while it is in the cache, and no row is moved on its own: rows were permuted
  among themselves when they were written.
- The windows' rows, one after another, are cut into batches; ``shards.course`` says who delivers which. A batch may
  span two windows, and two epochs where an iteration has no end or a budget of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from actlake.storage.arrays import crc32c
from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import mix64

I64 = npt.NDArray[np.int64]

#: source, batch, target, length, count: what ``Deal`` says of one move.
Move = tuple[int, int, int, int, int]


class Scatter(NamedTuple):
    """Single rows of a unit, int64 [n] each: from ``source`` to rows ``target`` of one batch."""

    source: I64
    batch: int
    target: I64


#: Sets the order of units apart from the order of rows in a shuffle block, which hashes likewise.
_SALT = np.uint64(0x756E6974)


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """The shards of a stream, int64 [K] each: their numbers (ascending), committed rows and void rows."""

    shard: I64
    n_rows: I64
    n_void: I64

    @property
    def n_kept(self) -> int:
        """Rows that the stream delivers in an epoch."""
        return int(self.n_rows.sum() - self.n_void.sum())

    def to_json(self) -> dict[str, Any]:
        """Return the snapshot as a few integers: runs of shards, total of rows, and a checksum of everything."""
        first = np.flatnonzero(np.diff(self.shard, prepend=-2) != 1)
        count = np.diff(np.append(first, len(self.shard)))
        runs = np.stack([self.shard[first], count], axis=1).tolist()
        return {"shards": runs, "n_rows": int(self.n_rows.sum()), "crc32c": self._crc32c()}

    def restrict(self, value: Mapping[str, Any]) -> Self:
        """Return the older snapshot that ``to_json`` described, as a part of this one.

        Raises ``BadInputError`` where shards of it are no longer there or have other rows.
        """
        runs = [np.arange(first, first + count, dtype=np.int64) for first, count in value["shards"]]
        wanted = np.concatenate([*runs, np.empty(0, dtype=np.int64)])
        lost = np.setdiff1d(wanted, self.shard)
        if len(lost):
            raise BadInputError(
                f"the state is of a snapshot with shard {lost[0]} ({len(lost)} such shards), which is not committed "
                "now; 'actlake ingest' with the dataset's job file builds it again"
            )
        chosen = np.isin(self.shard, wanted)
        older = type(self)(shard=self.shard[chosen], n_rows=self.n_rows[chosen], n_void=self.n_void[chosen])
        if older._crc32c() != value["crc32c"]:
            raise BadInputError(
                f"the state is of a snapshot with {value['n_rows']} rows in {len(wanted)} shards; the same shards have "
                f"{older.n_rows.sum()} rows now ({older.n_void.sum()} void): a short last shard has grown, or rows "
                "became void. Begin a new stream"
            )
        return older

    def _crc32c(self) -> int:
        return crc32c(np.stack([self.shard, self.n_rows, self.n_void]).astype("<i8").tobytes())


@dataclass(frozen=True, kw_only=True, eq=False)
class Units:
    """Units in a fixed order, int64 [U] each: shard, first row inside the shard, stored rows."""

    shard: I64
    start: I64
    n_rows: I64

    def __len__(self) -> int:
        return len(self.shard)

    @classmethod
    def of(cls, snapshot: Snapshot, rows_per_unit: int) -> Self:
        """Cut the shards of a snapshot into units, in stored order."""
        per_shard = -(-snapshot.n_rows // rows_per_unit)
        shard, n_rows = np.repeat(snapshot.shard, per_shard), np.repeat(snapshot.n_rows, per_shard)
        first = np.repeat(np.cumsum(per_shard) - per_shard, per_shard)
        start = (np.arange(len(shard)) - first) * rows_per_unit
        return cls(shard=shard, start=start, n_rows=np.minimum(rows_per_unit, n_rows - start))


def epoch_order(seed: int, epoch: int, ids: I64) -> I64:
    """Return the permutation of the units with the given numbers in one epoch: int64 [U], the place of the next."""
    key = mix64(mix64(np.uint64(seed) ^ _SALT) ^ np.uint64(epoch))
    return np.argsort(mix64(key ^ ids.astype(np.uint64)), kind="stable")


def units_per_window(buffer_nbytes: int, nbytes_per_row: int, rows_per_unit: int, batch_size: int) -> int:
    """Return how many units half of a buffer holds, one batch at least.

    Where it holds whole batches, a power of two of them (of the fewest units that fill whole batches): then each unit
    gives each batch equally many rows, and goes to all of them in one strided copy.
    """
    even = int(batch_size // np.gcd(batch_size, rows_per_unit))
    fit = buffer_nbytes // 2 // (nbytes_per_row * rows_per_unit)
    if fit < even:
        return max(-(-batch_size // rows_per_unit), int(fit))
    return even << int(fit // even).bit_length() - 1


def window_bounds(n_units: int, per_window: int, batch_size: int, rows_per_unit: int) -> list[tuple[int, int]]:
    """Cut the units of a segment into windows of ``per_window``; the last two share the rest, so that both mix."""
    even = int(batch_size // np.gcd(batch_size, rows_per_unit))
    n_whole, rest = divmod(n_units, per_window)
    cuts = [window * per_window for window in range(n_whole + 1)]
    if rest:
        if n_whole:
            half = (per_window + rest) // 2
            cuts[-1] = cuts[-2] + min(per_window, -(-half // even) * even)
        cuts.append(n_units)
    return [(start, stop) for start, stop in pairwise(cuts) if start < stop]


@dataclass(frozen=True, kw_only=True, eq=False)
class Deal:
    """Which rows of each unit of a window go where, as moves, unit by unit.

    ``moves``, int64 [M, 5], source, batch, target, length, count: a move takes ``count`` pieces of ``length`` kept rows
    each, one after another from ``source`` on, to rows ``target`` and following of as many batches from ``batch`` on.
    ``stripes`` say the same in the order in which rows are put out:
    the place of each stripe's first row among the kept rows of all units, one unit after another, and its length.
    """

    n_rows: int
    stripes: tuple[I64, I64]
    moves: I64
    first_move: list[int]

    def taken(self) -> I64:
        """Return int64 [n_rows]: where each row that is put out comes among the kept rows of all units."""
        first, length = self.stripes
        return np.repeat(first - (np.cumsum(length) - length), length) + np.arange(self.n_rows)

    def table_of(self, unit: int) -> I64:
        """Return the moves of a unit, int64 [M, 5]."""
        return self.moves[self.first_move[unit] : self.first_move[unit + 1]]

    def of_unit(self, unit: int) -> list[Move | Scatter]:
        """Return the moves of a unit."""
        return [tuple(move) for move in self.table_of(unit).tolist()]


def deal(
    kept: Sequence[int] | I64, batch_size: int, *, filled: int = 0, skip: int = 0, take: int | None = None
) -> Deal:
    """Plan a window over units of ``kept`` rows each.

    The window's first ``skip`` rows go nowhere, nor do those after the next ``take`` (None: all). The first row that is
    taken goes to row ``filled`` of batch 0, which the window before has begun.
    """
    kept_U = np.asarray(kept, dtype=np.int64)
    n_stripes = max(1, int(kept_U.sum()) // batch_size)
    n_units = len(kept_U)
    edges_TU = np.arange(n_stripes + 1)[:, None] * kept_U * n_units + np.arange(n_units) * n_stripes
    edges_TU //= n_stripes * n_units
    source, length = edges_TU[:-1].reshape(-1), np.diff(edges_TU, axis=0).reshape(-1)
    unit = np.tile(np.arange(n_units), n_stripes)
    # Leave out what is not taken; then `place` counts the rows of the batches in flight, begun ones included.
    place = np.cumsum(length) - length - skip
    late = np.clip(-place, 0, length)
    source, length, place = source + late, length - late, place + late + filled
    if take is not None:
        length = np.clip(take + filled - place, 0, length)
    first, stripe_length = (np.cumsum(kept_U) - kept_U)[unit] + source, length
    # Cut at the batches' edges.
    n_cuts = np.maximum(0, (place + length - 1) // batch_size - place // batch_size) + 1
    n_cuts[length == 0] = 0
    piece = np.repeat(np.arange(len(length)), n_cuts)
    nth = np.arange(len(piece)) - np.repeat(np.cumsum(n_cuts) - n_cuts, n_cuts)
    batch = place[piece] // batch_size + nth
    low = np.maximum(place[piece], batch * batch_size)
    high = np.minimum(place[piece] + length[piece], (batch + 1) * batch_size)
    by_unit = np.argsort(unit[piece], kind="stable")
    unit, batch = unit[piece][by_unit], batch[by_unit]
    source = (source[piece] + low - place[piece])[by_unit]
    target, length = low[by_unit] - batch * batch_size, (high - low)[by_unit]
    # Pieces that follow each other into the same rows of the next batch make one move.
    same = (np.diff(unit) == 0) & (np.diff(batch) == 1) & (np.diff(target) == 0) & (np.diff(length) == 0)
    begins = np.flatnonzero(np.append(True, ~(same & (source[1:] == source[:-1] + length[:-1])))[: len(unit)])
    counts = np.diff(np.append(begins, len(unit)))
    columns = (source[begins], batch[begins], target[begins], length[begins], counts)
    return Deal(
        n_rows=int(stripe_length.sum()),
        stripes=(first, stripe_length),
        moves=np.stack(columns, axis=1),
        first_move=np.searchsorted(unit[begins], np.arange(n_units + 1)).tolist(),
    )
