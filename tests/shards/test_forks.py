"""A stream in use in other processes: forked, spawned and pickled at any moment."""

import itertools
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
from formula_dataset import BOTH, SMALL, WIDE, Made, rows_of

from actlake.shards.dataset import ActivationDataset
from actlake.shards.stream import ActivationStream
from actlake.shards.view import View

Make = Callable[..., Made]

# A fork of a process with threads is what is tested here; Python 3.12 warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def _take(batches: Any, n: int, to: Any) -> None:
    to.send(rows_of(list(itertools.islice(batches, n))))


def in_child(how: str, batches: Any, n: int) -> list[list[int]]:
    context: Any = multiprocessing.get_context(how)
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_take, args=(batches, n, send), daemon=True)
    child.start()
    try:
        assert receive.poll(60), "the child waits for what it does not have"
        found: list[list[int]] = receive.recv()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    return found


def endless(ds: ActivationDataset | View, **options: Any) -> ActivationStream:
    return ds.stream(BOTH, **({"batch_size": 40, "epochs": None, "buffer_bytes": SMALL} | options))


@pytest.fixture
def on_disk(local: str) -> ActivationDataset:
    return Made(local, 868).build_all().open()


def test_forks_at_any_moment_of_the_threads_go_on_on_their_own(ds: ActivationDataset) -> None:
    # One batch a window: the threads are always at work, and whatever lock they have there, a fork meets it.
    stream = endless(ds, buffer_bytes=0)
    wanted = rows_of(list(itertools.islice(endless(ds, buffer_bytes=0), 40)))
    it = iter(stream)
    for step in range(20):
        assert next(it).row.tolist() == wanted[step]
        assert in_child("fork", it, 12) == wanted[step + 1 : step + 13]


def test_an_iteration_begun_in_the_child_goes_on_from_the_parents_state(ds: ActivationDataset) -> None:
    stream, wanted = endless(ds), rows_of(list(itertools.islice(endless(ds), 12)))
    it = iter(stream)
    for _ in range(3):
        next(it)
    assert in_child("fork", stream, 5) == wanted[3:8]
    # The parent's own is not disturbed.
    assert rows_of(list(itertools.islice(it, 5))) == wanted[3:8]


@pytest.mark.slow
def test_a_spawned_process_goes_on_from_the_streams_state(on_disk: ActivationDataset) -> None:
    stream, wanted = endless(on_disk), rows_of(list(itertools.islice(endless(on_disk), 12)))
    for _ in itertools.islice(stream, 4):
        pass
    assert in_child("spawn", stream, 6) == wanted[4:10]


@pytest.mark.parametrize("n_taken", [0, 1, 20, 21, 22, 43])
def test_a_pickle_in_the_middle_goes_on_alike(ds: ActivationDataset, n_taken: int) -> None:
    stream = endless(ds, order="sequence") if n_taken % 2 else endless(ds.where(position=(4, None)))
    it = iter(stream)
    for _ in range(n_taken):
        next(it)
    copy = pickle.loads(pickle.dumps(stream))
    assert copy.settings == stream.settings
    assert rows_of(list(itertools.islice(copy, 9))) == rows_of(list(itertools.islice(it, 9)))


def test_a_pickled_rank_keeps_its_rank(ds: ActivationDataset) -> None:
    streams = [ds.stream(WIDE, batch_size=40, rank=rank, world_size=2) for rank in range(2)]
    copies = pickle.loads(pickle.dumps(streams))
    assert [rows_of(list(copy)) for copy in copies] == [rows_of(list(stream)) for stream in streams]


def test_counters_do_not_lock(ds: ActivationDataset) -> None:
    def locks(value: Any, depth: int = 0) -> list[Any]:
        if isinstance(value, type(threading.Lock()) | type(threading.RLock())):
            return [value]
        inside = [*vars(value).values()] if hasattr(value, "__dict__") and depth < 3 else []
        return [found for each in inside for found in locks(each, depth + 1)]

    assert not locks(endless(ds))
