"""Corpus order: where the stored rows of a shuffle block go so that its tokens come one after another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np

from actlake.shards.order import I64, Move, Scatter, Units
from actlake.storage.rowspace import block_places
from actlake.storage.spec import DatasetSpec


def span_of(spec: DatasetSpec, rows_per_unit: int) -> int:
    """Return the rows that are put into order together: whole shuffle blocks and whole units."""
    block = rows_per_unit if spec.order == "sequence" else spec.rows_per_block
    return math.lcm(block, rows_per_unit)


def span_bounds(units: Units, span: int) -> list[tuple[int, int]]:
    """Cut units in stored order into spans: ranges of their numbers."""
    begins = (np.diff(units.shard, prepend=-1) != 0) | (units.start % span == 0)
    edges = [*np.flatnonzero(begins).tolist(), len(units)]
    return list(pairwise(edges))


def corpus_order(spec: DatasetSpec, shard: int, start: int, n_rows: int) -> I64:
    """Return int64 [n]: the stored places, counted from ``start``, of a shard's rows in corpus order.

    ``start`` is the first row of a shuffle block; the rows are whole blocks, or reach to the end of the shard.
    """
    if spec.order == "sequence":
        return np.arange(n_rows, dtype=np.int64)
    first = (shard * spec.rows_per_shard + start) // spec.rows_per_block
    parts = []
    for number, low in enumerate(range(0, n_rows, spec.rows_per_block)):
        n = min(spec.rows_per_block, n_rows - low)
        parts.append(low + block_places(spec.seed, first + number, n))
    return np.concatenate(parts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Unpermuted:
    """Where each kept row of some spans goes, row by row: dearer than stripes, since every row is copied on its own."""

    n_rows: int
    places: I64
    first_kept: I64
    batch_size: int
    filled: int

    @classmethod
    def of(
        cls,
        order: I64,
        kept: Sequence[np.ndarray[tuple[int], np.dtype[np.bool_]]],
        batch_size: int,
        *,
        filled: int,
        skip: int,
        take: int,
    ) -> Self:
        """Plan a span: ``order`` are its stored places in corpus order, ``kept`` says of each unit which rows count.

        The first ``skip`` rows go nowhere, the next ``take`` to row ``filled`` of batch 0 and following.
        """
        kept_rows = np.concatenate(list(kept))
        among_kept = np.cumsum(kept_rows) - 1
        places = among_kept[order[kept_rows[order]]][skip : skip + take]
        first_kept = np.cumsum([0, *(int(mask.sum()) for mask in kept)])
        return cls(n_rows=len(places), places=places, first_kept=first_kept, batch_size=batch_size, filled=filled)

    def of_unit(self, unit: int) -> list[Move | Scatter]:
        """Return one move of rows for each batch that has some of the unit."""
        low, high = self.first_kept[unit : unit + 2]
        out = np.flatnonzero((self.places >= low) & (self.places < high))
        source, place = self.places[out] - low, out + self.filled
        batch = place // self.batch_size
        edges = np.flatnonzero(np.diff(batch, prepend=-1, append=-1)).tolist()
        return [
            Scatter(source=source[a:b], batch=int(batch[a]), target=place[a:b] % self.batch_size)
            for a, b in pairwise(edges)
        ]

    def table_of(self, unit: int) -> None:
        """Rows are taken one by one."""

    def taken(self) -> I64:
        """Return int64 [n_rows]: where each row that is put out comes among the kept rows of all units."""
        return self.places
