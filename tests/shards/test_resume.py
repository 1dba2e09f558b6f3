"""Going on with a stream: states, pickles, forks, errors, and the threads that end with it."""

import gc
import itertools
import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from formula_dataset import BOTH, NARROW, SMALL, WIDE, Made, flat, make_spec, rows_of

from actlake.shards.batch import TokenBatch
from actlake.shards.dataset import ActivationDataset
from actlake.shards.stream import ActivationStream
from actlake.storage.errors import BadInputError, CorruptObjectError

Make = Callable[..., Made]


def test_iter_goes_on_from_the_state_and_into_the_next_epoch(ds: ActivationDataset) -> None:
    wanted = ds.stream([WIDE], batch_size=100, epochs=3, buffer_bytes=SMALL)
    in_one = rows_of(list(wanted))
    stream = ds.stream([WIDE], batch_size=100, buffer_bytes=SMALL)
    first = iter(stream)
    found = [next(first), next(first), next(first)]
    found += list(stream)
    assert len(found) == len(stream) == 8
    found += list(stream) + list(stream)
    assert rows_of(found) == in_one
    assert len(wanted) == 24
    assert stream.state_dict()["position"]["segment"] == 3


def test_an_older_iterator_of_the_same_stream_is_refused(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=100)
    older, newer = iter(stream), iter(stream)
    next(newer)
    with pytest.raises(BadInputError, match="replaced by a later iter"):
        next(older)
    assert next(newer).row.shape == (100,)


def test_an_endless_stream_carries_the_tail_over(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=100, epochs=None, buffer_bytes=SMALL)
    with pytest.raises(TypeError, match="endless"):
        len(stream)
    rows = flat(list(itertools.islice(stream, 27)))
    for epoch in range(3):
        assert sorted(rows[epoch * 868 : (epoch + 1) * 868]) == list(range(868))
    small = ds.stream([WIDE], batch_size=2000, epochs=None)
    (batch,) = itertools.islice(small, 1)
    # Two epochs whole, and the beginning of the third.
    assert np.bincount(np.bincount(batch.row.numpy())).tolist() == [0, 0, 3 * 868 - 2000, 2000 - 2 * 868]


@pytest.mark.parametrize(
    ("batch_size", "epochs", "drop_last", "n_batches"),
    [(100, 2, True, 16), (100, 2, False, 18), (64, 1, True, 13), (100, None, True, 20), (868, 3, True, 3)],
)
def test_restored_at_every_step_all_later_batches_are_identical(
    make: Make, batch_size: int, epochs: int | None, drop_last: bool, n_batches: int
) -> None:
    ds = make().build_all().open()

    def fresh() -> ActivationStream:
        return ds.stream(
            BOTH, batch_size=batch_size, seed=2, epochs=epochs, drop_last=drop_last, buffer_bytes=SMALL * 2
        )

    stream = fresh()
    states, batches = [stream.state_dict()], []
    for batch in itertools.islice(stream, n_batches):
        batches.append(batch)
        states.append(stream.state_dict())
    for step, state in enumerate(states):
        text = json.dumps(state)
        assert len(text) < 4096
        restored = fresh()
        restored.load_state_dict(json.loads(text))
        later = list(itertools.islice(restored, n_batches - step))
        assert rows_of(later) == rows_of(batches[step:])
        for one, other in zip(later, batches[step:], strict=True):
            assert torch.equal(one[WIDE].view(torch.int16), other[WIDE].view(torch.int16))


def test_a_state_saved_after_the_last_batch_ends_like_the_iteration_did(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=100)
    it = iter(stream)
    for _ in range(8):
        next(it)
    restored = ds.stream([WIDE], batch_size=100)
    restored.load_state_dict(stream.state_dict())
    assert list(restored) == []
    assert list(it) == []
    assert rows_of(list(restored)) == rows_of(list(stream))


def test_a_state_describes_rows_delivered_not_rows_prefetched(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=32, buffer_bytes="1GiB")
    it = iter(stream)
    assert stream.state_dict()["position"]["pieces"] == []
    next(it)
    assert stream.state_dict()["position"]["pieces"] == [[0, 0, 868, 1, 27]]
    next(it)
    assert stream.state_dict()["position"]["pieces"] == [[0, 0, 868, 2, 27]]


@pytest.mark.parametrize("n_taken", [0, 3, 8])
def test_a_pickled_stream_goes_on_where_it_was(ds: ActivationDataset, n_taken: int) -> None:
    stream = ds.stream(BOTH, batch_size=100, epochs=2, buffer_bytes=SMALL)
    it = iter(stream)
    for _ in range(n_taken):
        next(it)
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.hook_points == (NARROW, WIDE)
    assert rows_of(list(copy)) == rows_of(list(it))


def test_a_stream_goes_on_after_its_dataset_grew(make: Make) -> None:
    made = make(1000).build(0, 2)
    stream = made.open().stream([WIDE], batch_size=50, buffer_bytes=SMALL)
    it = iter(stream)
    first = [next(it) for _ in range(3)]
    state = stream.state_dict()
    rest = rows_of(list(it))
    grown = made.build(1, 3).open()
    assert len(grown.stream([WIDE], batch_size=50)) == 20
    again = grown.stream([WIDE], batch_size=50, buffer_bytes=SMALL)
    again.load_state_dict(state)
    assert rows_of(list(again)) == rest
    assert sorted(flat(first) + list(itertools.chain(*rest)))[-1] < 768
    assert len(again) == 512 // 50


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 9}, "seed: the state has 0, this stream 9"),
        ({"batch_size": 50}, "batch_size: the state has 100, this stream 50"),
        ({"points": BOTH}, f"points: the state has .'{WIDE}'., this stream .'{NARROW}', '{WIDE}'."),
        ({"drop_last": False}, "drop_last: the state has True, this stream False"),
        ({"epochs": None}, "epochs: the state has 'counted', this stream 'endless'"),
        ({"rows": 500}, "rows: the state has None, this stream 500"),
        ({"order": "sequence"}, "order: the state has 'shuffled', this stream 'sequence'"),
        ({"buffer_bytes": 1}, r"units_per_window: the state has \d+, this stream 4"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_the_difference(
    ds: ActivationDataset, changes: dict[str, Any], named: str
) -> None:
    state = ds.stream([WIDE], batch_size=100).state_dict()
    options: dict[str, Any] = {"points": [WIDE], "batch_size": 100} | changes
    with pytest.raises(BadInputError, match=named):
        ds.stream(**options).load_state_dict(state)


def test_a_state_of_another_dataset_or_no_state_is_refused(ds: ActivationDataset, tmp_path: object) -> None:
    other = Made(f"{tmp_path}/other", 868, spec=make_spec(model="other")).build_all().open()
    state = other.stream([WIDE], batch_size=100).state_dict()
    stream = ds.stream([WIDE], batch_size=100)
    with pytest.raises(BadInputError, match="dataset_id: the state has"):
        stream.load_state_dict(state)
    good = stream.state_dict()
    broken: Any
    for broken in ({}, [], {"of": 3}, good | {"position": {}}, good | {"rank": 0}, {**good, "of": {}}):
        with pytest.raises(BadInputError, match=r"no stream state|not of this stream"):
            stream.load_state_dict(broken)


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("actlake-read")]


def wait_for_no_threads() -> bool:
    deadline = time.monotonic() + 20
    while reader_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not reader_threads()


def test_threads_end_with_the_iteration_however_it_ends(make: Make) -> None:
    made = make().build_all()
    ds = made.open()
    assert wait_for_no_threads()
    for _ in ds.stream([WIDE], batch_size=32, buffer_bytes=SMALL):
        assert reader_threads()
        break
    assert wait_for_no_threads()
    it = iter(ds.stream([WIDE], batch_size=32, buffer_bytes=SMALL))
    next(it)
    del it
    gc.collect()
    assert wait_for_no_threads()
    list(ds.stream([WIDE], batch_size=32, buffer_bytes=SMALL))
    assert wait_for_no_threads()
    made.flip(WIDE, 2, 100)
    with pytest.raises(CorruptObjectError):
        list(ds.stream([WIDE], batch_size=32, buffer_bytes=SMALL))
    assert wait_for_no_threads()


def test_an_error_in_a_thread_is_raised_as_it_is_and_the_stream_goes_on_once_it_is_mended(make: Make) -> None:
    made = make().build_all()
    wanted = flat(list(made.open().stream([WIDE], batch_size=32, buffer_bytes=SMALL)))
    made.flip(WIDE, 2, 100)
    stream = made.open().stream([WIDE], batch_size=32, buffer_bytes=SMALL)
    found: list[TokenBatch] = []
    with pytest.raises(CorruptObjectError, match=r"shard 2, layers\.3\.resid_post, chunk 0"):
        found.extend(stream)
    made.flip(WIDE, 2, 100)
    taken = flat(found)
    assert taken == wanted[: len(taken)]
    assert taken + flat(list(stream)) == wanted


def _take_in_child(it: Any, to: Any) -> None:
    to.send(rows_of(list(it)))


# A fork of a process with threads is what is tested here; Python 3.12 warns of it.
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_in_the_middle_of_an_iteration_continues_on_its_own(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=50, buffer_bytes=SMALL)
    it = iter(stream)
    for _ in range(3):
        next(it)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_take_in_child, args=(it, send), daemon=True)
    child.start()
    try:
        assert receive.poll(60), "the child waits for threads that it does not have"
        in_child = receive.recv()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert in_child == rows_of(list(it))
    assert len(in_child) == 14


def test_a_rank_without_a_batch_in_an_epoch_goes_into_the_next_one_too(ds: ActivationDataset) -> None:
    # 868 rows make one batch and a short one: two of the four ranks have none.
    for rank in range(4):
        stream = ds.stream([WIDE], batch_size=600, drop_last=False, rank=rank, world_size=4)
        assert len(list(stream)) == rank % 2
        assert stream.state_dict()["position"]["segment"] == 1
