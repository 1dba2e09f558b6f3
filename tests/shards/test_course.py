"""Who delivers which rows, without reading any: property tests of the pure part of a stream."""

import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actlake.shards.course import Course, Position, Share, merge, split, trimmed
from actlake.storage.errors import BadInputError

#: Rows as numbers counted through all segments.
Batch = range
Taken = tuple[Batch, Position]


@dataclass(frozen=True)
class Sizes:
    """Segments of the sizes given, over and over."""

    sizes: tuple[int, ...]

    def __call__(self, number: int) -> int:
        return self.sizes[number % len(self.sizes)]

    def before(self, number: int) -> int:
        n_rounds, rest = divmod(number, len(self.sizes))
        return n_rounds * sum(self.sizes) + sum(self.sizes[:rest])


def course_of(sizes: Iterable[int], batch_size: int, n_segments: int | None, **options: Any) -> Course:
    return Course(rows_of=Sizes(tuple(sizes)), batch_size=batch_size, n_segments=n_segments, **options)


def run(course: Course, position: Position) -> Iterator[Taken]:
    """Yield each batch of one iteration as ranges of rows, and the position after it."""
    for start in course.walk(position):
        assert start is not None
        piece = start.pieces[0]
        assert isinstance(course.rows_of, Sizes)
        before = course.rows_of.before(piece.segment)
        for n in range(len(piece)):
            low, high = replace(piece, start=piece.start + n, stop=piece.start + n + 1).rows(course.batch_size)
            yield range(before + low, before + high), start.delivered(n + 1)


def batches_of(course: Course, position: Position) -> list[Batch]:
    return [batch for batch, _ in run(course, position)]


def ranks_of(course: Course, n_ranks: int) -> list[Course]:
    return [replace(course, rank=Share(index=rank, count=n_ranks)) for rank in range(n_ranks)]


def workers_of(course: Course, n_workers: int) -> list[Course]:
    return [replace(course, worker=Share(index=worker, count=n_workers)) for worker in range(n_workers)]


def in_order(batches: Iterator[Batch] | list[Batch]) -> list[Batch]:
    return sorted(batches, key=lambda batch: batch.start)


#: Times of a shared machine say nothing.
bounded = settings(max_examples=60, deadline=None)

SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=4)
BATCH = st.integers(1, 17)
RANKS = st.integers(1, 5)


@bounded
@given(
    n_rows=st.integers(1, 120),
    batch_size=BATCH,
    n_epochs=st.integers(1, 3),
    n_ranks=RANKS,
    n_workers=st.integers(1, 3),
    drop_last=st.booleans(),
    n_iterations=st.integers(1, 2),
)
def test_epochs(
    n_rows: int, batch_size: int, n_epochs: int, n_ranks: int, n_workers: int, drop_last: bool, n_iterations: int
) -> None:
    course, group = course_of([n_rows], batch_size, n_epochs, drop_last=drop_last), batch_size * n_ranks
    counts, found, ends = set(), [], set()
    for rank in ranks_of(course, n_ranks):
        mine = []
        for worker in workers_of(rank, n_workers):
            position = Position()
            for _ in range(n_iterations):
                mine += batches_of(worker, position)
                position = worker.finished(position)
            ends.add(position)
        counts.add(len(mine))
        found += mine
    # All consumers are at one place when they end, and count the same rows as dropped.
    total = n_epochs * n_iterations
    n_dropped = n_rows % group if drop_last else 0
    assert ends == {Position(segment=total, dropped=total * n_dropped)}
    wanted = []
    for epoch in range(total):
        first, last = epoch * n_rows, (epoch + 1) * n_rows - n_dropped
        wanted += [range(row, min(row + batch_size, last)) for row in range(first, last, batch_size)]
    assert in_order(found) == wanted
    if drop_last:
        assert len(counts) == 1
        assert {len(batch) for batch in found} <= {batch_size}


@bounded
@given(sizes=SIZES, batch_size=BATCH, n_ranks=RANKS, n_workers=st.integers(1, 3), drop_last=st.booleans())
def test_a_stream_without_an_end_drops_nothing(
    sizes: list[int], batch_size: int, n_ranks: int, n_workers: int, drop_last: bool
) -> None:
    sizes = [*sizes, 1]
    course = course_of(sizes, batch_size, None, carry=True, drop_last=drop_last)
    n_segments = 3 * len(sizes)
    n_whole = 3 * sum(sizes) // (batch_size * n_ranks) * n_ranks
    found = []
    for rank in ranks_of(course, n_ranks):
        mine = []
        for worker in workers_of(rank, n_workers):
            mine += [
                batch
                for batch, position in itertools.takewhile(
                    lambda taken: taken[1].pieces[0].segment < n_segments,
                    itertools.islice(run(worker, Position()), 999),
                )
            ]
        assert len(mine) == n_whole // n_ranks
        found += mine
    assert in_order(found) == [range(n * batch_size, (n + 1) * batch_size) for n in range(n_whole)]


@bounded
@given(
    n_rows=st.integers(4, 60),
    batch_size=st.integers(3, 17),
    budget=st.integers(1, 150),
    n_ranks=RANKS,
    drop_last=st.booleans(),
)
def test_a_budget_of_rows_is_kept_in_every_iteration(
    n_rows: int, batch_size: int, budget: int, n_ranks: int, drop_last: bool
) -> None:
    course = course_of([n_rows], batch_size, None, carry=True, budget=budget, drop_last=drop_last)
    ranks, group = ranks_of(course, n_ranks), batch_size * n_ranks
    positions = [Position()] * n_ranks
    counts: list[list[int]] = []
    for iteration in range(3):
        found = [batches_of(*pair) for pair in zip(ranks, positions, strict=True)]
        positions = [rank.finished(position) for rank, position in zip(ranks, positions, strict=True)]
        low = iteration * budget
        high = low + (budget // group * group if drop_last else budget)
        assert in_order(list(itertools.chain(*found))) == [
            range(row, min(row + batch_size, high)) for row in range(low, high, batch_size)
        ]
        n_dropped = (iteration + 1) * (budget % group) if drop_last else 0
        segment, offset = divmod(low + budget, n_rows)
        assert set(positions) == {Position(segment=segment, offset=offset, dropped=n_dropped)}
        counts.append([len(batches) for batches in found])
    # Every iteration is as long as the first: len() holds wherever it begins.
    assert counts[0] == counts[1] == counts[2]
    assert not drop_last or len(set(counts[0])) == 1


@bounded
@given(sizes=SIZES, batch_size=BATCH, n_ranks=RANKS, drop_last=st.booleans())
def test_waves_are_one_run_of_rows(sizes: list[int], batch_size: int, n_ranks: int, drop_last: bool) -> None:
    course = course_of(sizes, batch_size, len(sizes), carry=True, drop_last=drop_last)
    ranks, n_rows = ranks_of(course, n_ranks), sum(sizes)
    found = [batches_of(rank, Position()) for rank in ranks]
    high = n_rows - n_rows % (batch_size * n_ranks) if drop_last else n_rows
    wanted = [range(row, min(row + batch_size, high)) for row in range(0, high, batch_size)]
    assert in_order(list(itertools.chain(*found))) == wanted
    assert {rank.finished(Position()) for rank in ranks} == {Position(segment=len(sizes), dropped=n_rows - high)}
    assert not drop_last or len({len(batches) for batches in found}) == 1


def test_the_walk_says_where_the_next_segment_is_not_known_and_goes_on_once_it_is() -> None:
    known: dict[int, int] = {0: 10}
    course = Course(rows_of=known.get, batch_size=4, n_segments=2, carry=True)
    walk = course.walk(Position())
    first = next(walk)
    assert first is not None
    assert first.pieces[0].rows(4) == (0, 8)
    assert next(walk) is next(walk) is None
    known[1] = 7
    second = next(walk)
    assert second is not None
    # The two rows left over and six of the seven.
    assert second.pieces[0].rows(4) == (-2, 6)
    assert next(walk, "end") == "end"


# --- states ---


def at_step(course: Course, step: int) -> Position:
    """Where a consumer is after so many batches; where it ends if it has fewer."""
    position = Position()
    for _, after in itertools.islice(run(course, position), step):
        position = after
    n_batches = len(list(itertools.islice(run(course, Position()), step + 1)))
    return position if step < n_batches else course.finished(position)


MODES = st.sampled_from(["epochs", "waves", "budget", "endless"])


def course_in(mode: str, sizes: list[int], batch_size: int, drop_last: bool) -> Course:
    if mode == "epochs":
        return course_of(sizes[:1], batch_size, 2, drop_last=drop_last)
    if mode == "waves":
        return course_of(sizes, batch_size, len(sizes), carry=True, drop_last=drop_last)
    budget = 2 * sum(sizes) + 3 if mode == "budget" else None
    return course_of(sizes, batch_size, None, carry=True, drop_last=drop_last, budget=budget)


@bounded
@given(
    mode=MODES,
    sizes=st.lists(st.integers(5, 60), min_size=1, max_size=3),
    batch_size=st.integers(5, 17),
    n_ranks=st.integers(1, 3),
    n_workers=st.integers(1, 2),
    drop_last=st.booleans(),
)
def test_a_position_restored_at_any_step_goes_on_alike(
    mode: str, sizes: list[int], batch_size: int, n_ranks: int, n_workers: int, drop_last: bool
) -> None:
    course = course_in(mode, sizes, batch_size, drop_last)
    for rank in ranks_of(course, n_ranks):
        for worker in workers_of(rank, n_workers):
            taken = list(itertools.islice(run(worker, Position()), 12))
            for step, (_, position) in enumerate(taken, 1):
                saved = Position.from_json(json.loads(json.dumps(position.to_json())))
                assert saved == position
                later = list(itertools.islice(run(worker, saved), 12 - step))
                assert later == taken[step:]
                assert mode == "endless" or worker.finished(saved) == worker.finished(Position())


@bounded
@given(
    mode=MODES,
    sizes=st.lists(st.integers(5, 60), min_size=1, max_size=3),
    batch_size=st.integers(3, 17),
    worlds=st.tuples(RANKS, RANKS, RANKS),
    steps=st.tuples(st.integers(0, 12), st.integers(0, 4)),
    drop_last=st.booleans(),
)
def test_what_is_left_is_dealt_anew_to_another_number_of_ranks(
    mode: str, sizes: list[int], batch_size: int, worlds: tuple[int, int, int], steps: tuple[int, int], drop_last: bool
) -> None:
    course = course_in(mode, sizes, batch_size, drop_last)
    done: list[Batch] = []
    ranks, positions = ranks_of(course, worlds[0]), [Position()] * worlds[0]
    n_trimmed = 0
    for step, n_next in zip(steps, worlds[1:], strict=True):
        ends = []
        for rank, position in zip(ranks, positions, strict=True):
            taken = list(itertools.islice(run(rank, position), step))
            done += [batch for batch, _ in taken]
            after = taken[-1][1] if taken else position
            ends.append(after if len(taken) == step else rank.finished(after))
        merged = merge(list(zip(ranks, ends, strict=True)))
        if step and not merged.running:
            # What comes next is another iteration.
            return
        ranks = ranks_of(course, n_next)
        if ranks[0].bounded:
            kept = trimmed(merged, n_next, batch_size)
            n_trimmed += kept.dropped - merged.dropped
            assert 0 <= kept.dropped - merged.dropped < n_next * batch_size
            merged = kept
        positions = [split(merged, rank.rank) for rank in ranks]
        # Between 0 and 1 batch more or less a rank.
        left = [sum(map(len, position.pieces)) for position in positions]
        assert max(left) - min(left) <= (0 if ranks[0].bounded else 1)
    # Whatever ends is read to its end.
    n_most = 40 if mode == "endless" else None
    last = [
        list(itertools.islice(run(rank, position), n_most)) for rank, position in zip(ranks, positions, strict=True)
    ]
    found = in_order([*done, *(batch for taken in last for batch, _ in taken)])
    # No row twice, every batch one that any other number of ranks has too.
    assert all(one.stop <= other.start for one, other in itertools.pairwise(found))
    cut = batches_of(course, Position()) if mode != "endless" else itertools.islice(run_endless(course), len(found) * 3)
    assert {batch for batch in found if len(batch) == batch_size} <= set(cut)
    if ranks[0].bounded:
        assert len({len(taken) for taken in last}) == 1
    if mode == "endless":
        # Whole up to where the first rank has stopped.
        low = min(taken[-1][1].pieces[0].segment for taken in last)
        n_rows = Sizes(tuple(sizes)).before(low)
        covered = set(itertools.chain(*found))
        assert covered >= set(range(max(0, n_rows - batch_size * max(worlds))))
    elif not drop_last:
        assert [row for batch in found for row in batch] == list(itertools.chain(*batches_of(course, Position())))


def run_endless(course: Course) -> Iterator[Batch]:
    return (batch for batch, _ in run(course, Position()))


def test_ranks_that_ended_at_once_and_ranks_that_did_not_are_still_of_one_step() -> None:
    # A batch of 20 for each, then one of 10 across the epoch's end for the second alone.
    course = course_of([45], 20, None, carry=True, budget=50, drop_last=False)
    ranks = ranks_of(course, 2)
    n_batches = [len(batches_of(rank, Position())) for rank in ranks]
    assert sorted(n_batches) == [1, 2]
    positions = [at_step(rank, 1) for rank in ranks]
    merged = merge(list(zip(ranks, positions, strict=True)))
    assert batches_of(course, merged) == [range(40, 50)]


def test_states_of_different_steps_are_refused() -> None:
    course = course_of([100], 10, 3)
    ranks = ranks_of(course, 2)
    fresh, ended = Position(), ranks[1].finished(Position())
    for positions in ([fresh, at_step(ranks[1], 1)], [fresh, ended]):
        with pytest.raises(BadInputError, match="save the state of every rank after the same step"):
            merge(list(zip(ranks, positions, strict=True)))


def test_pieces_that_two_states_share_are_refused() -> None:
    course = course_of([100], 10, 1)
    rank = replace(course, rank=Share(index=0, count=2))
    with pytest.raises(BadInputError, match="two of the states are of one rank"):
        merge([(rank, at_step(rank, 1)), (rank, at_step(rank, 1))])


@bounded
@given(n=st.integers(0, 1000), count=st.integers(1, 40))
def test_shares_are_contiguous_and_even(n: int, count: int) -> None:
    parts = [Share(index=index, count=count).of(n) for index in range(count)]
    assert [row for start, stop in parts for row in range(start, stop)] == list(range(n))
    sizes = [stop - start for start, stop in parts]
    assert max(sizes) - min(sizes) <= 1
