"""The stream's order: pure functions, so pure properties."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.shards.order import Deal, Scatter, Snapshot, Units, deal, epoch_order, units_per_window, window_bounds
from actlake.storage.errors import BadInputError

KEPT = st.lists(st.integers(0, 70), min_size=1, max_size=12)


def output_sequence(kept: list[int], batch_size: int) -> list[tuple[int, int]]:
    """The rows of a window as (unit, row of it), as the module's text says it."""
    n_stripes = max(1, sum(kept) // batch_size)

    def edge(unit: int, stripe: int) -> int:
        return math.floor(Fraction(stripe * kept[unit], n_stripes) + Fraction(unit, len(kept)))

    return [
        (unit, row)
        for stripe in range(n_stripes)
        for unit in range(len(kept))
        for row in range(edge(unit, stripe), edge(unit, stripe + 1))
    ]


def dealt(plan: Deal, n_units: int, batch_size: int) -> dict[int, tuple[int, int]]:
    """Carry out a plan row by row: place over all batches to (unit, row)."""
    places: dict[int, tuple[int, int]] = {}
    for unit in range(n_units):
        for move in plan.of_unit(unit):
            assert not isinstance(move, Scatter)
            source, batch, target, length, count = move
            assert length > 0
            assert target + length <= batch_size
            for i in range(length * count):
                place = (batch + i // length) * batch_size + target + i % length
                assert place not in places
                places[place] = (unit, source + i)
    return places


@given(
    kept=KEPT,
    batch_size=st.integers(1, 90),
    filled=st.integers(0, 89),
    skip=st.integers(0, 400),
    take=st.none() | st.integers(0, 400),
)
def test_deal_puts_each_row_where_the_text_says(
    kept: list[int], batch_size: int, filled: int, skip: int, take: int | None
) -> None:
    filled, skip = filled % batch_size, min(skip, sum(kept))
    plan = deal(kept, batch_size, filled=filled, skip=skip, take=take)
    wanted = output_sequence(kept, batch_size)[skip:][:take]
    assert plan.n_rows == len(wanted)
    starts = np.cumsum([0, *kept]).tolist()
    assert plan.taken().tolist() == [starts[unit] + row for unit, row in wanted]
    assert dealt(plan, len(kept), batch_size) == {filled + i: item for i, item in enumerate(wanted)}


def test_a_whole_unit_goes_to_all_batches_of_a_regular_window_in_one_move() -> None:
    plan = deal([1024] * 64, 4096)
    assert [plan.of_unit(unit) for unit in (0, 5)] == [[(0, 0, 0, 64, 16)], [(0, 0, 320, 64, 16)]]


def test_every_batch_of_a_window_has_rows_of_all_its_units() -> None:
    plan = deal([64] * 10, 64)
    for unit in range(10):
        striped = [move for move in plan.of_unit(unit) if not isinstance(move, Scatter)]
        moves = [(batch + i, length) for _, batch, _, length, count in striped for i in range(count)]
        assert [batch for batch, _ in moves] == list(range(10))
        assert {length for _, length in moves} == {6, 7}


@given(
    n_units=st.integers(1, 200),
    rows_per_unit=st.sampled_from([1, 3, 32, 64, 100, 1024]),
    batch_size=st.integers(1, 5000),
    buffer_nbytes=st.integers(1, 2_000_000),
)
def test_windows_cut_the_epoch_into_pieces_that_fit(
    n_units: int, rows_per_unit: int, batch_size: int, buffer_nbytes: int
) -> None:
    per_window = units_per_window(buffer_nbytes, 100, rows_per_unit, batch_size)
    assert per_window * rows_per_unit >= batch_size
    assert per_window * rows_per_unit * 100 <= buffer_nbytes // 2 or (per_window - 1) * rows_per_unit < batch_size
    bounds = window_bounds(n_units, per_window, batch_size, rows_per_unit)
    assert [place for start, stop in bounds for place in range(start, stop)] == list(range(n_units))
    assert all(stop - start <= per_window for start, stop in bounds)


def test_windows_are_a_power_of_two_of_whole_batches_where_the_buffer_holds_some() -> None:
    assert units_per_window(1 << 20, 64, 1024, 4096) == 8
    assert units_per_window(7 << 18, 64, 1024, 4096) == 8
    assert units_per_window(1 << 21, 64, 1024, 3000) == 16
    assert units_per_window(1 << 27, 64, 1024, 3000) == 750
    assert units_per_window(0, 64, 1024, 4096) == 4


def test_the_last_window_is_not_a_remnant() -> None:
    assert window_bounds(101, 50, 1, 1) == [(0, 50), (50, 75), (75, 101)]
    assert window_bounds(20, 8, 4096, 1024) == [(0, 8), (8, 16), (16, 20)]
    assert window_bounds(24, 16, 4096, 1024) == [(0, 12), (12, 24)]
    assert window_bounds(3, 8, 4096, 1024) == [(0, 3)]


def test_epoch_order_is_pinned() -> None:
    # A change here gives every saved state another order: raise STATE_VERSION with it.
    assert epoch_order(0, 0, np.arange(8)).tolist() == [4, 3, 2, 1, 7, 0, 6, 5]
    assert epoch_order(0, 1, np.arange(8)).tolist() == [2, 5, 6, 4, 3, 0, 7, 1]
    assert epoch_order(7, 0, np.arange(8)).tolist() == [6, 3, 7, 5, 2, 0, 1, 4]


@given(seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 1000), n=st.integers(0, 300))
def test_epoch_order_is_a_permutation_that_more_units_only_interleave(seed: int, epoch: int, n: int) -> None:
    order = epoch_order(seed, epoch, np.arange(n))
    assert sorted(order.tolist()) == list(range(n))
    longer = epoch_order(seed, epoch, np.arange(n + 50))
    assert [unit for unit in longer.tolist() if unit < n] == order.tolist()


@given(
    shards=st.sets(st.integers(0, 40), min_size=1),
    last=st.integers(1, 256),
    rows_per_unit=st.sampled_from([32, 64, 128, 256]),
)
def test_units_cover_every_row_once(shards: set[int], last: int, rows_per_unit: int) -> None:
    snapshot = snapshot_of(sorted(shards), last)
    units = Units.of(snapshot, rows_per_unit)
    covered = [
        (shard, start + i)
        for shard, start, n in zip(units.shard.tolist(), units.start.tolist(), units.n_rows.tolist(), strict=True)
        for i in range(n)
    ]
    counts = zip(snapshot.shard.tolist(), snapshot.n_rows.tolist(), strict=True)
    assert covered == [(shard, row) for shard, n in counts for row in range(n)]
    assert (units.start % rows_per_unit == 0).all()


def snapshot_of(shards: list[int], last: int = 256) -> Snapshot:
    n_rows = np.full(len(shards), 256)
    n_rows[-1] = last
    return Snapshot(shard=np.array(shards), n_rows=n_rows, n_void=np.zeros(len(shards), dtype=np.int64))


@given(older=st.sets(st.integers(0, 30), min_size=1), newer=st.sets(st.integers(0, 30)))
def test_a_snapshot_is_found_again_in_a_dataset_that_grew(older: set[int], newer: set[int]) -> None:
    saved = snapshot_of(sorted(older))
    found = snapshot_of(sorted(older | newer)).restrict(saved.to_json())
    assert found.shard.tolist() == sorted(older)
    assert found.to_json() == saved.to_json()


def test_a_snapshot_of_a_million_shards_is_small() -> None:
    assert len(str(snapshot_of([*range(900_000), *range(900_100, 1_000_000)]).to_json())) < 100


def test_a_snapshot_whose_shards_changed_is_refused() -> None:
    saved = snapshot_of([0, 1, 2], last=100).to_json()
    with pytest.raises(BadInputError, match=r"612 rows in 3 shards.*768 rows now"):
        snapshot_of([0, 1, 2]).restrict(saved)
    with pytest.raises(BadInputError, match=r"shard 1 \(1 such shards\), which is not committed"):
        snapshot_of([0, 2, 3]).restrict(saved)
