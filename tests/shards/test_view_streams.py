"""Streams of chosen rows: full batches of them alone, in an order and with states of their own."""

import itertools
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from formula_dataset import BOTH, SMALL, WIDE, Made, flat, rows_of, same_bits

from actlake.shards.dataset import ActivationDataset
from actlake.storage.errors import BadInputError, UnknownNameError

Make = Callable[..., Made]

OPTIONS: dict[str, Any] = {"batch_size": 40, "buffer_bytes": SMALL}

CASES: list[tuple[dict[str, Any], Callable[[int], bool]]] = [
    ({"position": (4, None)}, lambda row: row % 97 >= 4),
    ({"position": (10, 12)}, lambda row: 10 <= row % 97 < 12),
    ({"role": "text"}, lambda row: True),
    ({"token_id": range(0, 1009, 2)}, lambda row: row * 7 % 1009 % 2 == 0),
    ({"position": (4, None), "token_id": [7, 70, 77]}, lambda row: row % 97 >= 4 and row * 7 % 1009 in (7, 70, 77)),
]


@pytest.mark.parametrize(("conditions", "holds"), CASES, ids=lambda case: str(case)[:40])
@pytest.mark.parametrize("voids", [frozenset[int](), frozenset({5, 300, *range(256, 290)})])
def test_the_chosen_rows_come_once_in_full_batches(
    make: Make, conditions: dict[str, Any], holds: Callable[[int], bool], voids: frozenset[int]
) -> None:
    ds = make(voids=voids).build_all().open()
    view = ds.where(**conditions)
    kept = [row for row in range(868) if holds(row) and row not in voids]
    batches = list(view.stream(BOTH, **OPTIONS, drop_last=False))
    assert sorted(flat(batches)) == kept == view.row_numbers.tolist()
    assert view.n_rows == len(kept)
    assert [len(batch) for batch in batches[:-1]] == [40] * (len(batches) - 1)
    for batch in batches:
        assert all(same_bits(batch[point], ds[point][batch.row.numpy()]) for point in BOTH)


def test_views_of_views_choose_what_all_choose(ds: ActivationDataset) -> None:
    view = ds.where(position=(4, None)).where(token_id=range(500))
    together = ds.where(position=(4, None), token_id=range(500))
    assert flat(list(view.stream(WIDE, **OPTIONS))) == flat(list(together.stream(WIDE, **OPTIONS)))


def test_an_epoch_is_shuffled_anew_and_an_endless_stream_carries_over(ds: ActivationDataset) -> None:
    view = ds.where(position=(50, None))
    n_kept = view.n_rows
    rows = flat(list(itertools.islice(view.stream(WIDE, **OPTIONS, epochs=None), 3 * n_kept // 40)))
    first, second = rows[:n_kept], rows[n_kept : 2 * n_kept]
    assert sorted(first) == sorted(second) == view.row_numbers.tolist()
    assert first != second


def test_restored_at_every_step_and_by_pickle(make: Make) -> None:
    ds = make(voids=frozenset({3, 400})).build_all().open()
    view = ds.where(position=(20, None), norm={WIDE: (0.5, 1.5)})
    stream = view.stream(BOTH, **OPTIONS, epochs=2)
    taken = [(batch.row.tolist(), json.dumps(stream.state_dict()), pickle.dumps(stream)) for batch in stream]
    assert len(taken) > 10
    for step, (_, state, pickled) in enumerate(taken, 1):
        again = view.stream(BOTH, **OPTIONS, epochs=2)
        again.load_state_dict(json.loads(state))
        wanted = [rows for rows, _, _ in taken[step:]]
        assert rows_of(list(again)) == wanted
        if step % 4 == 0:
            assert rows_of(list(pickle.loads(pickled))) == wanted


def test_a_norm_is_of_the_median_at_the_time_of_the_state(make: Make) -> None:
    made = make(2000).build(0, 1)
    view = made.open().where(norm={WIDE: (None, 1.0)})
    stream = view.stream(WIDE, **OPTIONS)
    it = iter(stream)
    next(it)
    state = stream.state_dict()
    rest = rows_of(list(it))
    made.offset = 40.0
    made.build(2, 3, 4)
    grown = made.open().where(norm={WIDE: (None, 1.0)})
    assert grown.n_rows != view.n_rows
    again = grown.stream(WIDE, **OPTIONS)
    again.load_state_dict(state)
    assert rows_of(list(again)) == rest


def test_states_of_other_conditions_are_refused(ds: ActivationDataset) -> None:
    streams = [
        each.stream(WIDE, **OPTIONS)
        for each in (
            ds,
            ds.where(position=(4, None)),
            ds.where(position=(5, None)),
            ds.where(position=(4, None), role=0),
        )
    ]
    for one, other in itertools.permutations(streams, 2):
        with pytest.raises(BadInputError, match=r"the state is of rows chosen by|filter: the state has"):
            one.load_state_dict(other.state_dict())


def test_a_filter_that_leaves_too_little_is_refused(ds: ActivationDataset) -> None:
    with pytest.raises(BadInputError, match="the filter leaves no row, so there is nothing to stream"):
        ds.where(position=(97, None)).stream(WIDE)
    with pytest.raises(BadInputError, match="8 rows make no batch of 40 on each of 1 ranks; use a smaller batch_size"):
        ds.where(position=(96, None)).stream(WIDE, **OPTIONS)
    assert len(flat(list(ds.where(position=(96, None)).stream(WIDE, batch_size=8)))) == 8
    with pytest.raises(UnknownNameError):
        ds.where(position=(4, None)).stream("layers.9.resid_post")
