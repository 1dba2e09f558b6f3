"""What a stream did, as numbers."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass
class Counters:
    """Counts of one stream in one process; a copy in another process counts anew.

    Threads only append to queues: there is no lock that a fork could find held.
    """

    n_batches: int = 0
    n_rows: int = 0
    nbytes: int = 0
    wall_s: float = 0.0
    wait_s: float = 0.0
    decode_s: float = 0.0
    gather_s: float = 0.0
    n_damaged_units: int = 0
    n_skipped_rows: int = 0
    damaged_shards: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._timings: deque[tuple[float, float]] = deque()
        self._damage: deque[tuple[int, str]] = deque()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a block as waited."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.wait_s += time.perf_counter() - begun

    def unit(self, decode_s: float, gather_s: float) -> None:
        """Count one unit of one hook point, in seconds of its thread."""
        self._timings.append((decode_s, gather_s))

    def deliver(self, n_rows: int, n_planned: int, nbytes_per_row: int) -> None:
        """Count one batch of ``n_rows`` rows, of ``n_planned`` where damage took some."""
        self.n_batches += 1
        self.n_rows += n_rows
        self.nbytes += n_rows * nbytes_per_row
        self.n_skipped_rows += n_planned - n_rows
        self._settle()

    def damage(self, shard: int, error: Exception) -> None:
        """Count one unit that could not be read."""
        self._damage.append((shard, str(error)))

    def to_json(self) -> dict[str, Any]:
        """Return the counts with the rate of delivery, in uncompressed bytes over all time spent in the stream."""
        self._settle()
        rate = self.nbytes / 1e9 / self.wall_s if self.wall_s else 0.0
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"gb_per_s": rate}

    def _settle(self) -> None:
        while self._timings:
            decode_s, gather_s = self._timings.popleft()
            self.decode_s += decode_s
            self.gather_s += gather_s
        while self._damage:
            shard, message = self._damage.popleft()
            self.n_damaged_units += 1
            self.damaged_shards.setdefault(shard, message)
