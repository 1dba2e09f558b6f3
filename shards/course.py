"""Which batches a rank delivers, as pure functions: segments, pieces, positions.

A stream's rows come in **segments**: the epochs of a snapshot, or the waves of a dataset that is followed. Batch j of a
segment is its rows ``offset + j * batch_size`` and following; rows below 0 are those that the segments before left
over. Ranks take *contiguous* runs of a segment's batches, so that a window is decoded by one rank (by two where a run
ends inside of it), each rank has the same number of full batches, and fewer than ``batch_size * world_size`` rows are
left over: dropped, or carried into the next segment.

What is left to a rank is a few **pieces**, runs of batches. The pieces of all ranks together can be dealt to any other
number of ranks: the batches stay what they were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import mix64


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Batches ``start:stop`` of a segment; the rows from ``end`` on are not theirs, so the last one may be short."""

    segment: int
    offset: int
    end: int
    start: int
    stop: int

    def rows(self, batch_size: int) -> tuple[int, int]:
        """Return the piece's rows ``start, stop`` of the segment; negative ones are of the segments before."""
        start, stop = (min(self.offset + edge * batch_size, self.end) for edge in (self.start, self.stop))
        return start, stop

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Position:
    """What one rank (or one loader process of it) still has to deliver.

    The rows that are not dealt yet begin ``offset`` rows into ``segment`` (or before it). A running iteration ends at
    segment ``until`` (None: never), and where it has a budget of rows when ``left`` of them is 0. ``dropped`` counts
    the rows that were left out so far, over all ranks.
    """

    pieces: tuple[Piece, ...] = ()
    segment: int = 0
    offset: int = 0
    running: bool = False
    until: int | None = None
    left: int | None = None
    dropped: int = 0

    def delivered(self, n_batches: int) -> Self:
        """Return the position after ``n_batches`` of the first piece; an exhausted one stays until it is left."""
        first = replace(self.pieces[0], start=self.pieces[0].start + n_batches)
        return replace(self, pieces=(first, *self.pieces[1:]))

    def to_json(self) -> dict[str, Any]:
        """Return the position as a few integers."""
        return asdict(self) | {"pieces": [[p.segment, p.offset, p.end, p.start, p.stop] for p in self.pieces]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what ``to_json`` returned; raise ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        pieces = tuple(
            Piece(segment=int(segment), offset=int(offset), end=int(end), start=int(start), stop=int(stop))
            for segment, offset, end, start, stop in value["pieces"]
        )
        segment, offset, dropped = (int(value[name]) for name in ("segment", "offset", "dropped"))
        until, left = (None if value[name] is None else int(value[name]) for name in ("until", "left"))
        return cls(
            pieces=pieces,
            segment=segment,
            offset=offset,
            running=bool(value["running"]),
            until=until,
            left=left,
            dropped=dropped,
        )


@dataclass(frozen=True, kw_only=True)
class Share:
    """One of ``count`` consumers, numbered from 0."""

    index: int = 0
    count: int = 1

    def of(self, n: int, turn: int = 0) -> tuple[int, int]:
        """Return the part ``start, stop`` of ``n`` things, that of the consumer ``turn`` places on.

        Parts differ by one at most.
        """
        index = (self.index + turn) % self.count
        return index * n // self.count, (index + 1) * n // self.count


@dataclass(frozen=True, kw_only=True)
class Course:
    """The batches of one rank; ``worker`` is the loader process among those that share them.

    ``rows_of`` gives the rows of a segment, None while that is not known. An iteration takes ``n_segments`` segments
    (None: it has no end), or ``budget`` rows over all ranks. ``carry`` says whether a batch may span segments.
    """

    rows_of: Callable[[int], int | None]
    batch_size: int
    n_segments: int | None
    carry: bool = False
    drop_last: bool = True
    budget: int | None = None
    rank: Share = Share()
    worker: Share = Share()

    @property
    def bounded(self) -> bool:
        """Whether ranks must end together: full batches alone, and an end."""
        return self.drop_last and (self.n_segments is not None or self.budget is not None)

    def walk(self, position: Position) -> Iterator[Position | None]:
        """Yield each position at which a piece begins that is to be delivered, to the end of the iteration.

        None where the next segment is not known yet.
        """
        position = self._begun(position)
        while True:
            if position.pieces and position.pieces[0]:
                yield position
            elif len(position.pieces) <= 1:
                if self._over(position):
                    return
                if self.rows_of(position.segment) is None:
                    yield None
                else:
                    position = self.opened(position)
                continue
            position = replace(position, pieces=position.pieces[1:] or (_exhausted(position.pieces[0]),))

    def finished(self, position: Position) -> Position:
        """Return where the next iteration begins, once this one has no more batches for this consumer."""
        position = self._begun(position)
        while not self._over(position):
            position = self.opened(position)
        return Position(segment=position.segment, offset=position.offset, dropped=position.dropped)

    def caught_up(self, position: Position, front: tuple[int, int]) -> Position:
        """Return the position with all pieces of the segments before ``front``, a segment and an offset."""
        while position.running and (position.segment, position.offset) < front and not self._over(position):
            opened = self.opened(position)
            position = replace(opened, pieces=position.pieces + opened.pieces)
        return position

    def _begun(self, position: Position) -> Position:
        if position.running:
            return position
        until = None if self.n_segments is None else position.segment + self.n_segments
        return replace(position, running=True, until=until, left=self.budget)

    def _over(self, position: Position) -> bool:
        return position.left == 0 or (self.budget is None and position.segment == position.until)

    def opened(self, position: Position) -> Position:
        """Return the position with this consumer's pieces of the next segment."""
        n_rows = self.rows_of(position.segment) or 0
        n_batches, n_taken = self._dealt(position, n_rows - position.offset)
        start, stop = self.rank.of(n_batches)
        # Where a segment has fewer batches than loader processes, a process without any would look for ever for its
        # first: a hash gives each its turn, whatever the rhythm in which batches become full.
        first, last = self.worker.of(stop - start, turn=int(mix64(position.segment)))
        end = position.offset + n_taken
        piece = Piece(segment=position.segment, offset=position.offset, end=end, start=start + first, stop=start + last)
        left = None if position.left is None else position.left - n_taken
        # A budget may end inside of a segment; the next iteration goes on there.
        onwards = left != 0 or end >= n_rows
        return replace(
            position,
            pieces=(piece,),
            segment=position.segment + onwards,
            offset=end - n_rows if onwards else end,
            left=left,
            dropped=position.dropped + max(0, n_taken - n_batches * self.batch_size),
        )

    def _dealt(self, position: Position, available: int) -> tuple[int, int]:
        # The batches that the next segment completes, and the rows that are then done with.
        group = self.batch_size * self.rank.count
        limit = available if position.left is None else min(position.left, available)
        if limit == position.left or not self.carry or position.segment + 1 == position.until:
            n_batches = limit // group * self.rank.count if self.drop_last else -(-limit // self.batch_size)
            return n_batches, limit
        return limit // group * self.rank.count, limit // group * group


def merge(positions: Sequence[tuple[Course, Position]]) -> Position:
    """Return one position with what all consumers together still have to deliver.

    Those that are behind are brought to the segment of the foremost. Raises ``BadInputError`` where they were not saved
    in the same iteration.
    """
    front = max((position.segment, position.offset) for _, position in positions)
    caught_up = [course.caught_up(position, front) for course, position in positions]
    ends = {(position.segment, position.offset) for position in caught_up}
    running = [position for position in caught_up if position.running]
    iterations = {(position.until, position.left) for position in running}
    if len(ends) > 1 or len(iterations) > 1:
        raise BadInputError(
            "the states were saved at different places of the stream: save the state of every rank after the same step"
        )
    pieces = tuple(sorted({p for position in caught_up for p in position.pieces if p}, key=_in_order))
    if sum(map(len, pieces)) != sum(len(p) for position in caught_up for p in position.pieces):
        raise BadInputError("two of the states are of one rank: give the state of every rank once")
    return replace(running[0] if running else caught_up[0], pieces=pieces)


def split(position: Position, share: Share) -> Position:
    """Return a consumer's part of the pieces."""
    start, stop = share.of(sum(map(len, position.pieces)))
    pieces, before = [], 0
    for piece in position.pieces:
        low, high = max(start - before, 0), min(stop - before, len(piece))
        if low < high:
            pieces.append(replace(piece, start=piece.start + low, stop=piece.start + high))
        before += len(piece)
    if not pieces and position.pieces:
        pieces = [_exhausted(position.pieces[-1])]
    return replace(position, pieces=tuple(pieces))


def trimmed(position: Position, n_shares: int, batch_size: int) -> Position:
    """Return the position less the last batches that would make ``n_shares`` parts of it unequal; they are dropped."""
    excess = sum(map(len, position.pieces)) % n_shares
    pieces = list(position.pieces)
    dropped = position.dropped + excess * batch_size
    while excess:
        cut = min(excess, len(pieces[-1]))
        pieces[-1] = replace(pieces[-1], stop=pieces[-1].stop - cut)
        excess -= cut
        if not pieces[-1] and len(pieces) > 1:
            pieces.pop()
    return replace(position, pieces=tuple(pieces), dropped=dropped)


def _exhausted(piece: Piece) -> Piece:
    return replace(piece, start=piece.stop)


def _in_order(piece: Piece) -> tuple[int, int]:
    return piece.segment, piece.start
