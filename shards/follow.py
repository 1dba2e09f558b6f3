"""Reading while ingestion goes on: waves of consecutive shards, each shuffled within itself once it is whole."""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from actlake.shards.counters import Counters
from actlake.shards.order import Snapshot, epoch_order, units_per_window, window_bounds
from actlake.shards.origin import Origin
from actlake.shards.segments import Part, Segment, deal_part
from actlake.shards.settings import StreamSettings
from actlake.shards.window import Dealer, Plan

#: Seconds between two looks for new commits.
POLL_S = 1.0


class Waves:
    """Waves of a dataset that grows to the rows that were planned when the stream was made.

    Which shards make a wave, and the order in it, follow from their numbers alone: never from when they were committed.
    """

    def __init__(
        self, origin: Origin, settings: StreamSettings, counters: Counters, planned: Sequence[int] | None = None
    ) -> None:
        self.origin, self._settings, self._counters = origin, settings, counters
        self._planned = list(origin.planned_shards if planned is None else planned)
        self._looked = 0.0
        self.segment = lru_cache(4)(self._segment)

    @property
    def n_waves(self) -> int:
        return -(-len(self._planned) // self._settings.wave_shards)

    def rows_of(self, number: int) -> int | None:
        """Return the rows of a wave; None while it has shards that are not committed in full."""
        return self.segment(number).n_rows if self._ready(number) else None

    def plan(self, part: Part, filled: int) -> Plan:
        """Deal stripes of every unit to every batch of the window."""
        return deal_part(part, self._settings.batch_size, filled)

    def describe(self) -> dict[str, Any]:
        """Return the planned rows and the size of a window."""
        return {"planned_rows": sum(self._planned), "buffer_bytes": self._settings.buffer_nbytes}

    def scale_shards(self) -> list[int]:
        """Return the first wave's shards: the scale must not depend on what is committed by now."""
        return list(self._shards(0))

    def _shards(self, number: int) -> range:
        per_wave = self._settings.wave_shards
        return range(number * per_wave, min((number + 1) * per_wave, len(self._planned)))

    def _ready(self, number: int) -> bool:
        if self._committed(number) is None and time.monotonic() - self._looked >= POLL_S:
            self.origin = self.origin.reopened()
            self._looked = time.monotonic()
        return self._committed(number) is not None

    def _committed(self, number: int) -> Snapshot | None:
        # The wave as a snapshot, once each of its shards has all rows that are planned.
        shards = np.array(self._shards(number), dtype=np.int64)
        known = self.origin.source(self._settings.points).snapshot()
        place = np.searchsorted(known.shard, shards)
        there = place < len(known.shard)
        if not there.all() or (known.shard[place] != shards).any():
            return None
        wave = Snapshot(shard=shards, n_rows=known.n_rows[place], n_void=known.n_void[place])
        whole = wave.n_rows >= np.array([self._planned[shard] for shard in shards])
        return wave if whole.all() else None

    def _segment(self, number: int) -> Segment:
        wave, settings = self._committed(number), self._settings
        assert wave is not None, "asked for before rows_of knew it"
        source = self.origin.source(settings.points)
        dealer = Dealer(source, wave, self._counters, skip_damaged=settings.on_damage == "skip")
        per_window = units_per_window(
            settings.buffer_nbytes, source.nbytes_per_row, dealer.rows_per_unit, settings.batch_size
        )
        return Segment(
            dealer=dealer,
            units=epoch_order(settings.seed, 0, dealer.unit_ids),
            bounds=window_bounds(len(dealer.units), per_window, settings.batch_size, dealer.rows_per_unit),
        )
