"""Windows on their way: what is read next, into which batches, and where the stream is after each of them."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.shards.columns import BatchColumns, WindowColumns
from actlake.shards.course import Course, Piece, Position
from actlake.shards.memory import Memory, Slot
from actlake.shards.prefetch import Workers
from actlake.shards.segments import Part, Segments
from actlake.shards.window import Window

#: Rows of a window that go to one batch: the window, and the first and last of the rows that it puts out.
Stretch = tuple[Window, int, int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Delivery:
    """One batch: its memory, its rows, where they come from; a position, and how much of it is delivered with this."""

    slot: Slot
    n_rows: int
    stretches: list[Stretch]
    reached: tuple[Position, int]

    def columns(self, keep: npt.NDArray[np.bool_] | None = None) -> BatchColumns:
        """Return the batch's row columns, of the rows of ``keep`` alone where it is given."""
        # Not the windows themselves, which hold the memory of other batches.
        parts = [(window.columns, low, high) for window, low, high in self.stretches]
        return BatchColumns(partial(_gather, parts, keep))

    def undamaged(self) -> npt.NDArray[np.bool_] | None:
        """Return bool [n_rows]: which rows could be read; None for all."""
        if not any(window.damaged for window, _, _ in self.stretches):
            return None
        return np.concatenate([~window.is_damaged(low, high) for window, low, high in self.stretches])


def _gather(
    parts: list[tuple[WindowColumns, int, int]], keep: npt.NDArray[np.bool_] | None, name: str
) -> npt.NDArray[Any]:
    values = np.concatenate([columns.gather(name, low, high) for columns, low, high in parts])
    return values if keep is None else values[keep]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flight:
    """A window of ``n_tasks`` tasks that have begun, and the batches that are whole when all are done."""

    tasks: "list[Future[None]]"
    n_tasks: int
    deliveries: list[Delivery]


class Dispatcher:
    """Begins the windows of a course, one after another."""

    def __init__(self, segments: Segments, course: Course, memory: Memory, workers: Workers) -> None:
        self._segments, self._course, self._memory, self._workers = segments, course, memory, workers
        # The batch that the last window has begun and the next one goes on filling.
        self._open: Slot | None = None
        self._filled: list[Stretch] = []

    def flights(self, position: Position) -> Iterator[Flight | None]:
        """Yield windows, begun as they are asked for; None where what comes next is not there yet."""
        for start in self._course.walk(position):
            if start is None:
                yield None
                continue
            first, stop = start.pieces[0].rows(self._course.batch_size)
            n_left, n_done = stop - first, 0
            for part in self._parts(start.pieces[0]):
                n_left -= part.take
                flight = self._begin(part, start, n_done, last=not n_left)
                n_done += len(flight.deliveries)
                yield flight

    def _parts(self, piece: Piece) -> Iterator[Part]:
        start, stop = piece.rows(self._course.batch_size)
        number = piece.segment
        while start < 0:
            number -= 1
            n_rows = self._segments.segment(number).n_rows
            start, stop = start + n_rows, stop + n_rows
        while start < stop:
            segment = self._segments.segment(number)
            yield from segment.parts(start, min(stop, segment.n_rows))
            start, stop = max(0, start - segment.n_rows), stop - segment.n_rows
            number += 1

    def _begin(self, part: Part, start: Position, n_done: int, *, last: bool) -> Flight:
        size = self._course.batch_size
        filled = sum(high - low for _, low, high in self._filled)
        plan = self._segments.plan(part, filled)
        n_slots = -(-(filled + plan.n_rows) // size)
        slots = [] if self._open is None else [self._open]
        slots += self._memory.take(n_slots - len(slots))
        window = part.segment.dealer.begin(part.units, plan, slots)
        deliveries = []
        for number, slot in enumerate(slots):
            low, high = (min(max(edge * size - filled, 0), plan.n_rows) for edge in (number, number + 1))
            stretches = [*(self._filled if number == 0 else []), (window, low, high)]
            n_rows = sum(to - since for _, since, to in stretches)
            if n_rows < size and not last:
                self._open, self._filled = slot, stretches
                break
            reached = start, n_done + number + 1
            deliveries.append(Delivery(slot=slot, n_rows=n_rows, stretches=stretches, reached=reached))
        else:
            self._open, self._filled = None, []
        n_tasks = len(part.units) * len(part.segment.dealer.source.points)
        tasks = part.segment.dealer.start(window, self._workers)
        return Flight(tasks=tasks, n_tasks=n_tasks, deliveries=deliveries)
