"""Several ranks on real bytes: equal counts, the same batches for any number of ranks, states that are dealt anew."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from formula_dataset import BOTH, SMALL, WIDE, Made, flat, make_spec, rows_of, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actlake.shards.batch import TokenBatch
from actlake.shards.dataset import ActivationDataset
from actlake.shards.stream import ActivationStream
from actlake.shards.view import View
from actlake.storage.errors import BadInputError
from actlake.storage.spec import PointSpec

Make = Callable[..., Made]

VOIDS = frozenset({0, 1, 31, 300, *range(512, 640), 867})


@pytest.fixture(scope="module")
def holey(tmp_path_factory: pytest.TempPathFactory) -> ActivationDataset:
    """868 rows, 133 of them void."""
    return Made(str(tmp_path_factory.mktemp("holey") / "data"), 868, voids=VOIDS).build_all().open()


def ranks_of(ds: ActivationDataset | View, n_ranks: int, **options: Any) -> list[ActivationStream]:
    options = {"batch_size": 50, "buffer_bytes": SMALL} | options
    return [ds.stream(WIDE, rank=rank, world_size=n_ranks, **options) for rank in range(n_ranks)]


def take(streams: list[ActivationStream], n: int) -> list[TokenBatch]:
    return [batch for stream in streams for batch in itertools.islice(stream, n)]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch_size=st.integers(11, 300),
    n_ranks=st.integers(1, 5),
    drop_last=st.booleans(),
    filtered=st.booleans(),
    buffer_bytes=st.sampled_from([0, 3000, SMALL, "1GiB"]),
)
def test_every_row_comes_once_over_all_ranks(
    holey: ActivationDataset, batch_size: int, n_ranks: int, drop_last: bool, filtered: bool, buffer_bytes: int | str
) -> None:
    kept = [row for row in range(868) if row not in VOIDS and (not filtered or row % 97 >= 40)]
    view = holey.where(position=(40, None)) if filtered else holey
    group = batch_size * n_ranks
    if drop_last and len(kept) < group:
        with pytest.raises(BadInputError, match=f"{len(kept)} rows make no batch of {batch_size}"):
            ranks_of(view, n_ranks, batch_size=batch_size)
        return
    streams = ranks_of(view, n_ranks, batch_size=batch_size, drop_last=drop_last, buffer_bytes=buffer_bytes)
    whole = rows_of(list(view.stream(WIDE, batch_size=batch_size, drop_last=False, buffer_bytes=buffer_bytes)))
    found = [rows_of(list(stream)) for stream in streams]
    n_dropped = len(kept) % group if drop_last else 0
    assert {stream.stats()["n_dropped_rows"] for stream in streams} == {n_dropped}
    # The same batches, in the same order within a rank, as one rank has.
    together = list(itertools.chain(*found))
    assert together == whole[: len(together)]
    rows = list(itertools.chain(*together))
    assert len(set(rows)) == len(rows) == len(kept) - n_dropped
    assert set(rows) <= set(kept)
    if drop_last:
        assert {len(batches) for batches in found} == {len(kept) // group}
    if filtered:
        with pytest.raises(TypeError, match="a filtered stream has no length"):
            len(streams[0])
    else:
        assert [len(stream) for stream in streams] == [len(batches) for batches in found]


def test_a_rank_without_a_batch_goes_into_the_next_epoch_with_the_others(make: Make) -> None:
    ds = make(10).build_all().open()
    streams = ranks_of(ds, 3, batch_size=8, drop_last=False)
    for epoch in range(1, 4):
        found = [rows_of(list(stream)) for stream in streams]
        assert [len(batches) for batches in found] == [0, 1, 1]
        assert sorted(itertools.chain(*itertools.chain(*found))) == list(range(10))
        assert {stream.state_dict()["position"]["segment"] for stream in streams} == {epoch}


def test_a_budget_ends_all_ranks_together_and_counts_what_it_leaves_out(ds: ActivationDataset) -> None:
    with pytest.warns(UserWarning, match="rows = 2000 is more than the 868 rows of .*: rows repeat"):
        streams = ranks_of(ds, 2, batch_size=60, rows=2000)
    for iteration in (1, 2):
        counts = [len(list(stream)) for stream in streams]
        assert counts == [len(stream) for stream in streams] == [16, 16]
        assert {stream.stats()["n_dropped_rows"] for stream in streams} == {iteration * 80}


def test_ranks_that_get_the_same_rows(ds: ActivationDataset) -> None:
    streams = [ds.stream(WIDE, batch_size=50, rank=rank, world_size=2, same_batch=True) for rank in range(2)]
    one, other = (rows_of(list(stream)) for stream in streams)
    assert one == other == rows_of(list(ds.stream(WIDE, batch_size=50)))


@pytest.mark.parametrize(
    ("rank", "world_size", "message"),
    [(2, 2, r"rank = 2 is not in 0\.\.1"), (-1, 2, r"rank = -1 is not in"), (1, None, "give both, or neither")],
)
def test_a_rank_that_there_is_not_is_refused(
    ds: ActivationDataset, rank: int, world_size: int | None, message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        ds.stream(WIDE, rank=rank, world_size=world_size)


# --- states ---


@pytest.mark.parametrize("options", [{}, {"drop_last": False}, {"epochs": None}, {"order": "sequence"}])
@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_each_rank_restored_at_every_step_goes_on_alike(
    holey: ActivationDataset, n_ranks: int, options: dict[str, Any]
) -> None:
    for rank, stream in enumerate(ranks_of(holey, n_ranks, **options)):
        states, batches = [], []
        for batch in itertools.islice(stream, 10):
            batches.append(batch)
            states.append(json.loads(json.dumps(stream.state_dict())))
        for step, state in enumerate(states, 1):
            again = ranks_of(holey, n_ranks, **options)[rank]
            again.load_state_dict(state)
            later = list(itertools.islice(again, len(batches) - step))
            assert rows_of(later) == rows_of(batches[step:])
            assert again.stats()["n_dropped_rows"] == stream.stats()["n_dropped_rows"] or not later
            for batch in later[:1]:
                assert same_bits(batch[WIDE], holey[WIDE][batch.row.numpy()])


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize(("n_before", "n_after"), [(1, 3), (2, 1), (3, 2), (2, 5)])
def test_the_states_of_all_ranks_go_on_on_another_number_of_ranks(
    holey: ActivationDataset, n_before: int, n_after: int, drop_last: bool
) -> None:
    options = {"batch_size": 40, "drop_last": drop_last}
    whole = rows_of(list(holey.stream(WIDE, buffer_bytes=SMALL, **{**options, "drop_last": False})))
    for step in range(0, len(whole) // n_before + 1, 3):
        before = ranks_of(holey, n_before, **options)
        done = rows_of(take(before, step)) if step else []
        states = json.loads(json.dumps([stream.state_dict() for stream in before]))
        after = ranks_of(holey, n_after, **options)
        for stream in after:
            stream.load_state_dict(states)
        later = [rows_of(list(stream)) for stream in after]
        together = sorted([*done, *itertools.chain(*later)])
        missing = [batch for batch in sorted(whole) if batch not in together]
        assert len(together) + len(missing) == len(whole)
        if drop_last:
            assert len({len(batches) for batches in later}) == 1
            assert len(missing) <= n_before + n_after
            n_missing = sum(map(len, missing))
            assert {stream.stats()["n_dropped_rows"] for stream in after} == {n_missing}
        else:
            assert not missing


def test_after_growth_the_states_of_all_ranks_go_on_over_the_shards_they_began_with(make: Make) -> None:
    made = make(1500).build(0, 2, 3)
    before = ranks_of(made.open(), 2)
    done = flat(take(before, 3))
    states = [stream.state_dict() for stream in before]
    made.build(1, 4, 5)
    after = ranks_of(made.open(), 3, epochs=1)
    for stream in after:
        stream.load_state_dict(states)
    rows = done + [row for stream in after for row in flat(list(stream))]
    # 7 batches a rank, 3 of them done; of the 8 that are left each of 3 ranks has 2.
    assert len(rows) == len(set(rows)) == 12 * 50
    assert set(rows) <= {*range(256), *range(512, 1024)}
    assert after[0].stats()["n_dropped_rows"] == 768 - 600


def test_a_state_is_small_for_many_hook_points_and_after_many_changes_of_ranks(make: Make) -> None:
    points = tuple(PointSpec(name=f"layers.{i}.resid_post", width=1, rows_per_chunk=128) for i in range(248))
    ds = make(256, spec=make_spec(hook_points=points)).build_all().open()
    options: dict[str, Any] = {"points": "layers.*.resid_post", "batch_size": 4, "epochs": None}
    states = [ds.stream(**options).state_dict()]
    for n_ranks in (6, 2, 5, 1):
        streams = [ds.stream(**options, rank=rank, world_size=n_ranks) for rank in range(n_ranks)]
        for stream in streams:
            stream.load_state_dict(states)
            next(iter(stream))
        states = [stream.state_dict() for stream in streams]
        assert max(len(json.dumps(state)) for state in states) < 4096


def test_states_that_do_not_fit_are_refused(ds: ActivationDataset) -> None:
    first, second = ranks_of(ds, 2)
    take([first, second], 2)
    states = [first.state_dict(), second.state_dict()]
    (one,) = ranks_of(ds, 1)
    for given_states, message in (
        (states[0], "this is rank 0 of 1, and the states are of rank 0 of 2: give the state of this rank, or a list"),
        (states[1:], "this is rank 0 of 1, and the states are of rank 1 of 2"),
        ([states[0], states[0]], "two of the states are of one rank"),
    ):
        with pytest.raises(BadInputError, match=message):
            one.load_state_dict(given_states)
    with pytest.raises(BadInputError, match="this is rank 1 of 2, and the states are of rank 0 of 2"):
        second.load_state_dict(states[0])
    take([second], 1)
    apart = [ranks_of(ds, 2)[0].state_dict(), second.state_dict()]
    with pytest.raises(BadInputError, match="save the state of every rank after the same step"):
        one.load_state_dict(apart)
    # What was refused has changed nothing.
    assert rows_of(list(one)) == rows_of(list(ds.stream(WIDE, batch_size=50, buffer_bytes=SMALL)))


def test_a_state_of_another_dataset_is_named_before_its_snapshot(ds: ActivationDataset, make: Make) -> None:
    other = Made(f"{make().url}-other", 5000, spec=make_spec(model="other")).build_all().open()
    state = other.stream(WIDE, batch_size=50).state_dict()
    with pytest.raises(BadInputError, match=r"the state is not of this stream:\n  dataset_id: the state has"):
        ds.stream(WIDE, batch_size=50).load_state_dict(state)


def test_a_state_that_is_refused_leaves_the_filter_as_it_was(ds: ActivationDataset) -> None:
    view = ds.where(norm={WIDE: (None, 1.0)})
    state, stream = view.stream(BOTH, batch_size=10).state_dict(), view.stream(BOTH, batch_size=20)
    state["of"]["filter"][0]["medians"] = [9.0]
    before = stream.state_dict()
    with pytest.raises(BadInputError, match="batch_size: the state has 10, this stream 20"):
        stream.load_state_dict(state)
    assert stream.state_dict() == before
