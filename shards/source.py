"""What a stream reads: hook points by the name that they have in a batch, of one dataset or of several that align."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from actlake.shards.objects import ShardReader
from actlake.shards.order import I64, Snapshot
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import CorruptObjectError
from actlake.storage.rowspace import ROLE_VOID
from actlake.storage.spec import DatasetSpec

#: Ends an error of damaged data.
REMEDY = "run 'actlake verify --repair' on the dataset, then 'actlake ingest' rebuilds the shard"


class RowMask(Protocol):
    """Chooses rows at read time. Thread-safe, picklable and deterministic."""

    def mask(self, shard: int, start: int, n_rows: int) -> npt.NDArray[np.bool_]:
        """Return bool [n_rows]: which of a shard's stored rows from ``start`` on are chosen."""

    def describe(self) -> Any:
        """Return a few JSON values that tell this choice from others."""

    def restored(self, description: Any) -> Self:
        """Return the choice as it was when ``describe`` was saved; raise ``BadInputError`` where it is another."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """Hook points to read together, and the rows that are chosen of them.

    ``points`` gives the reader and the stored array of each name in a batch; ``columns`` is the reader of the row
    columns. All readers are of one row space.
    """

    columns: ShardReader
    points: Mapping[str, tuple[ShardReader, ArraySpec]]
    filter: RowMask | None = None

    @property
    def spec(self) -> DatasetSpec:
        return self.columns.spec

    @cached_property
    def readers(self) -> tuple[ShardReader, ...]:
        """Each reader once, that of the row columns first."""
        found = {id(reader): reader for reader in (self.columns, *(reader for reader, _ in self.points.values()))}
        return tuple(found.values())

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        """The stored array of each name in a batch."""
        return {name: array for name, (_, array) in self.points.items()}

    @cached_property
    def nbytes_per_row(self) -> int:
        """Bytes of a row in a batch."""
        return sum(array.nbytes_per_row for array in self.arrays.values())

    @property
    def rows_per_unit(self) -> int:
        """Rows that are whole chunks of every hook point; divides the shard, since each of the chunk sizes does."""
        return math.lcm(*(array.rows_per_chunk for array in self.arrays.values()))

    @cached_property
    def local(self) -> bool:
        return all(reader.store.local for reader in self.readers)

    def snapshot(self) -> Snapshot:
        """Return the shards that every dataset has committed, each with the rows that line up in all of them."""
        parts = [_snapshot(reader) for reader in self.readers]
        first, *others = parts
        for other in others:
            shard, here, there = np.intersect1d(first.shard, other.shard, assume_unique=True, return_indices=True)
            n_rows = rows_in_common(self.spec, first.n_rows[here], other.n_rows[there])
            n_void = first.n_void[here] + other.n_void[there]
            some = n_rows > 0
            first = Snapshot(shard=shard[some], n_rows=n_rows[some], n_void=n_void[some])
        return first

    def voids(self, shard: int, n_rows: int) -> npt.NDArray[np.bool_]:
        """Return bool [n_rows]: which of a shard's rows are void in any of the datasets.

        Raises ``CorruptObjectError`` where a shard has another number of void rows than its record says.
        """
        void = np.zeros(n_rows, dtype=bool)
        for reader in self.readers:
            record = reader.record(shard)
            found = read_column(reader, "role", shard, 0, record.n_rows) == ROLE_VOID
            if int(found.sum()) != record.n_void:
                raise CorruptObjectError(
                    f"{reader.store.url}: shard {shard} has {found.sum()} void rows, its record says "
                    f"{record.n_void}; {REMEDY}"
                )
            void |= found[:n_rows]
        return void


def rows_in_common(spec: DatasetSpec, one: I64, other: I64) -> I64:
    """Return how many rows line up of shards that have ``one`` and ``other`` rows in two datasets of a row space.

    Where these differ, the last shuffle block of the shorter is permuted otherwise, since its permutation depends on
    its length: whole blocks alone are the same.
    """
    step = 1 if spec.order == "sequence" else spec.rows_per_block
    return np.where(one == other, one, np.minimum(one, other) // step * step)


def read_column(reader: ShardReader, column: str, shard: int, start: int, stop: int) -> npt.NDArray[np.generic]:
    """Return rows ``start:stop`` of one row column of a shard."""
    array = reader.arrays[f"rows/{column}"]
    step = array.rows_per_chunk
    first = start // step * step
    rows = np.empty(-(-(stop - first) // step) * step, dtype=array.numpy_dtype)
    reader.read_rows(array, shard, first, stop, rows)
    return rows[start - first : stop - first]


def _snapshot(reader: ShardReader) -> Snapshot:
    table = reader.manifest.columns("shard", "n_rows", "n_void")
    shard, n_rows, n_void = (table[name].to_numpy() for name in ("shard", "n_rows", "n_void"))
    # What is planned for a stream is in proportion to what the records say, and a record may be anyone's.
    if len(wrong := np.flatnonzero((n_rows > reader.spec.rows_per_shard) | (n_void > n_rows))):
        raise CorruptObjectError(
            f"{reader.store.url}: the record of shard {shard[wrong[0]]} says {n_rows[wrong[0]]} rows, "
            f"{n_void[wrong[0]]} void, of {reader.spec.rows_per_shard}; {REMEDY}"
        )
    return Snapshot(shard=shard, n_rows=n_rows, n_void=n_void)
