"""The rows of a stream in order, segment by segment: the epochs of a snapshot, in windows of units."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np

from actlake.shards.order import I64, deal, epoch_order, window_bounds
from actlake.shards.unpermute import Unpermuted, corpus_order, span_bounds, span_of
from actlake.shards.window import Dealer, Plan
from actlake.storage.errors import BadInputError

#: Segments that stay planned: a run of batches may go on into the next ones.
_PLANNED = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """Units in the order in which they are read, and the windows that they make."""

    dealer: Dealer
    units: I64
    bounds: list[tuple[int, int]]

    @property
    def n_rows(self) -> int:
        """Rows that the segment delivers."""
        return int(self.dealer.kept_U[self.units].sum())

    def parts(self, start: int, stop: int) -> "Iterator[Part]":
        """Yield what is to be read for the rows ``start:stop`` of the segment, window by window."""
        before = 0
        for low, high in self.bounds:
            units = self.units[low:high]
            n_rows = int(self.dealer.kept_U[units].sum())
            first, last = max(start - before, 0), min(stop - before, n_rows)
            if first < last:
                yield Part(segment=self, units=units, skip=first, take=last - first)
            before += n_rows
            if before >= stop:
                return


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One window of a segment, of which ``take`` rows after the first ``skip`` are wanted."""

    segment: Segment
    units: I64
    skip: int
    take: int


class Segments(Protocol):
    """Numbered segments; what one holds never changes."""

    def rows_of(self, number: int) -> int | None:
        """Return the rows of a segment; None where it cannot be read yet."""

    def segment(self, number: int) -> Segment:
        """Return a segment of which ``rows_of`` knows the rows."""

    def plan(self, part: Part, filled: int) -> Plan:
        """Return where the rows of a part go, the first of them to row ``filled`` of batch 0."""

    def describe(self) -> dict[str, Any]:
        """Return what decides the segments, as JSON values."""

    def scale_shards(self) -> list[int]:
        """Return the shards whose statistics a stream is normalised by."""


class _OfSnapshot:
    # What epochs in any order share: every one has the rows of the snapshot.
    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer

    def rows_of(self, number: int) -> int | None:
        """Return the rows of an epoch."""
        return self.n_rows

    @cached_property
    def n_rows(self) -> int:
        return int(self._dealer.kept_U.sum())

    def scale_shards(self) -> list[int]:
        """Return the snapshot's shards."""
        shards: list[int] = self._dealer.snapshot.shard.tolist()
        return shards


class Epochs(_OfSnapshot):
    """The epochs of a snapshot: its units, shuffled anew in each."""

    def __init__(self, dealer: Dealer, seed: int, batch_size: int, per_window: int) -> None:
        super().__init__(dealer)
        self._seed, self._batch_size, self._per_window = seed, batch_size, per_window
        self._bounds = window_bounds(len(dealer.units), per_window, batch_size, dealer.rows_per_unit)
        self.segment = lru_cache(_PLANNED)(self._segment)

    def _segment(self, number: int) -> Segment:
        order = epoch_order(self._seed, number, self._dealer.unit_ids)
        return Segment(dealer=self._dealer, units=order, bounds=self._bounds)

    def plan(self, part: Part, filled: int) -> Plan:
        """Deal stripes of every unit to every batch of the window."""
        return deal_part(part, self._batch_size, filled)

    def describe(self) -> dict[str, Any]:
        """Return the snapshot, and how many units a window has."""
        return {"snapshot": self._dealer.snapshot.to_json(), "units_per_window": self._per_window}


class InSequence(_OfSnapshot):
    """A snapshot in corpus order, the same in every epoch: each window is a few shuffle blocks, put back into order."""

    def __init__(self, dealer: Dealer, batch_size: int, buffer_nbytes: int) -> None:
        super().__init__(dealer)
        self._batch_size = batch_size
        span = span_of(dealer.source.spec, dealer.rows_per_unit)
        _require_span(span * dealer.source.nbytes_per_row, buffer_nbytes)
        bounds = span_bounds(dealer.units, span)
        self._only = Segment(dealer=dealer, units=np.arange(len(dealer.units)), bounds=bounds)

    def segment(self, number: int) -> Segment:
        """Return the one order that there is."""
        return self._only

    def plan(self, part: Part, filled: int) -> Plan:
        """Send each row of the blocks to its place in the corpus's order."""
        units, dealer = part.units, self._dealer
        first = int(units[0])
        shard, start = int(dealer.units.shard[first]), int(dealer.units.start[first])
        order = corpus_order(dealer.source.spec, shard, start, int(dealer.units.n_rows[units].sum()))
        kept = [dealer.kept(unit) for unit in units.tolist()]
        return Unpermuted.of(order, kept, self._batch_size, filled=filled, skip=part.skip, take=part.take)

    def describe(self) -> dict[str, Any]:
        """Return the snapshot."""
        return {"snapshot": self._dealer.snapshot.to_json()}


def _require_span(nbytes: int, buffer_nbytes: int) -> None:
    if 2 * nbytes > buffer_nbytes:
        raise BadInputError(
            f"order='sequence' puts whole shuffle blocks back into order, here {nbytes:,} bytes each, two at a time; "
            f"buffer_bytes is {buffer_nbytes:,}: give buffer_bytes={2 * nbytes}, or fewer hook points"
        )


def deal_part(part: Part, batch_size: int, filled: int) -> Plan:
    """Return the deal of a part's window in stripes."""
    kept: I64 = part.segment.dealer.kept_U[part.units]
    return _deal(kept.tobytes(), batch_size, filled, part.skip, part.take)


@lru_cache(_PLANNED)
def _deal(kept: bytes, batch_size: int, filled: int, skip: int, take: int) -> Plan:
    # Most windows are of whole units, and so of one plan, which costs as much as decoding half a chunk.
    return deal(np.frombuffer(kept, dtype=np.int64), batch_size, filled=filled, skip=skip, take=take)
