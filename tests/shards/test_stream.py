"""The stream: every row once, the stored bits, the same order every time, and exact resumption."""

import gc
import itertools
import json
import multiprocessing
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from formula_dataset import NARROW, WIDE, Made, make_spec

import actlake
from actlake.shards.batch import Memory, TokenBatch, to_tensor
from actlake.shards.dataset import ActivationDataset
from actlake.shards.stream import ActivationStream
from actlake.storage.errors import BadInputError, CorruptObjectError, UnknownNameError
from actlake.storage.records import commit, read_record
from actlake.storage.spec import PointSpec

Make = Callable[..., Made]
BOTH = [NARROW, WIDE]

#: A buffer of several windows an epoch on the 868 rows of `make`.
SMALL = 16_000


@pytest.fixture
def ds(make: Make) -> ActivationDataset:
    return make().build_all().open()


def rows_of(batches: list[TokenBatch]) -> list[list[int]]:
    return [batch.row.tolist() for batch in batches]


def flat(batches: list[TokenBatch]) -> list[int]:
    return list(itertools.chain.from_iterable(rows_of(batches)))


def same_bits(tensor: torch.Tensor, rows: Any) -> bool:
    return np.array_equal(tensor.view(torch.int16).numpy(), rows.view(np.int16))


@pytest.mark.parametrize("batch_size", [1, 7, 32, 64, 100, 256, 868, 1000])
@pytest.mark.parametrize("buffer_bytes", [1, SMALL, "1GiB"])
def test_an_epoch_has_every_row_once_with_its_stored_bits(
    ds: ActivationDataset, batch_size: int, buffer_bytes: int | str
) -> None:
    stream = ds.stream(BOTH, batch_size=batch_size, drop_last=False, buffer_bytes=buffer_bytes)
    batches = list(stream)
    assert sorted(flat(batches)) == list(range(868))
    assert len(stream) == len(batches)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert len(batches[-1]) == 868 % batch_size or batch_size
    everything = {name: ds[name][:] for name in ds.reader.arrays}
    for batch in batches:
        row = batch.row.numpy()
        assert all(same_bits(batch[point], everything[point][row]) for point in BOTH)
        for column in ("token_id", "position", "sequence", "role"):
            found = getattr(batch, column).numpy()
            assert found.dtype == everything[f"rows/{column}"].dtype
            assert np.array_equal(found, everything[f"rows/{column}"][row])


@pytest.mark.parametrize("batch_size", [7, 64, 100])
def test_drop_last_leaves_out_the_short_batch_and_nothing_else(ds: ActivationDataset, batch_size: int) -> None:
    whole = list(ds.stream([WIDE], batch_size=batch_size, drop_last=False, buffer_bytes=SMALL))
    stream = ds.stream([WIDE], batch_size=batch_size, buffer_bytes=SMALL)
    assert len(stream) == 868 // batch_size
    assert rows_of(list(stream)) == rows_of(whole)[: 868 // batch_size]


def test_batches_say_what_they_are(ds: ActivationDataset) -> None:
    batch = next(iter(ds.stream("layers.*.*", batch_size=32)))
    assert batch.hook_points == (NARROW, WIDE)
    assert (batch[WIDE].shape, batch[WIDE].dtype) == (torch.Size([32, 12]), torch.bfloat16)
    assert (batch.row.dtype, batch.token_id.dtype, batch.role.dtype) == (torch.int64, torch.int32, torch.uint8)
    assert "32 rows" in repr(batch)
    with pytest.raises(UnknownNameError, match=f"did you mean '{WIDE}'"):
        batch["layers.3.resid_pst"]


def test_the_order_depends_on_the_seed_and_the_epoch_alone(ds: ActivationDataset) -> None:
    def epochs(seed: int) -> list[list[list[int]]]:
        stream = ds.stream([WIDE], batch_size=64, seed=seed, buffer_bytes=SMALL)
        return [rows_of(list(stream)) for _ in range(2)]

    assert epochs(5) == epochs(5)
    orders = [*epochs(5), *epochs(6)]
    for one, other in itertools.combinations(orders, 2):
        assert one != other
        assert one[0] != other[0]


def test_the_order_does_not_depend_on_the_points_of_one_chunk_size(make: Make) -> None:
    points = tuple(PointSpec(name=f"layers.{i}.resid_post", width=4, rows_per_chunk=32) for i in range(2))
    ds = make(spec=make_spec(hook_points=points)).build_all().open()
    one, other = ([flat(list(ds.stream([f"layers.{i}.resid_post"], batch_size=64)))] for i in range(2))
    assert one == other


def test_a_batch_mixes_rows_from_everywhere(make: Make) -> None:
    ds = make(256 * 16).build_all().open()
    for batch in ds.stream([WIDE], batch_size=256, buffer_bytes="1GiB"):
        chunks = np.unique(batch.row.numpy() // 32)
        # All 128 chunks are in the window, 2 rows of each go to a batch.
        assert len(chunks) == 128
    # A buffer of 1,024 rows in flight: batches of 32 chunks from over half of the shards.
    window = 2 * 1024 * (8 + 12 * 2 + 17)
    for batch in ds.stream([WIDE], batch_size=256, buffer_bytes=window):
        assert len(np.unique(batch.row.numpy() // 32)) == 32
        assert len(np.unique(batch.row.numpy() // 256)) > 8


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
    assert stream.state_dict()["epoch"] == 3


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
    assert (small.state_dict()["epoch"], small.state_dict()["row"]) == (2, 2000 - 2 * 868)


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
    assert stream.state_dict()["row"] == 0
    next(it)
    assert stream.state_dict()["row"] == 32
    next(it)
    assert stream.state_dict()["row"] == 64


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
        ({"points": BOTH}, "points: the state has '1 of 2: 2', this stream '2 of 2: 3'"),
        ({"drop_last": False}, "drop_last: the state has True, this stream False"),
        ({"epochs": None}, "endless: the state has False, this stream True"),
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
    with pytest.raises(BadInputError, match="not of this stream"):
        stream.load_state_dict({})
    broken = {name: value for name, value in stream.state_dict().items() if name != "row"}
    with pytest.raises(BadInputError, match="no stream state"):
        stream.load_state_dict(broken)


def test_void_rows_are_skipped(make: Make) -> None:
    voids = frozenset({0, 1, 31, 300, *range(512, 640), 867})
    ds = make(voids=voids).build_all().open()
    stream = ds.stream(BOTH, batch_size=32, drop_last=False, buffer_bytes=SMALL)
    kept = [row for row in range(868) if row not in voids]
    states, batches = [], []
    for batch in stream:
        batches.append(batch)
        states.append(stream.state_dict())
    assert sorted(flat(batches)) == kept
    assert len(stream) == len(batches) == -(-len(kept) // 32)
    for batch in batches:
        assert same_bits(batch[WIDE], ds[WIDE][batch.row.numpy()])
        assert not (batch.role == 255).any()
    for step, state in enumerate(states[:-1]):
        restored = ds.stream(BOTH, batch_size=32, drop_last=False, buffer_bytes=SMALL)
        restored.load_state_dict(state)
        assert next(iter(restored)).row.tolist() == batches[step + 1].row.tolist()


def test_void_rows_that_the_record_does_not_count_are_refused(make: Make) -> None:
    made = make(voids=frozenset({300, 301})).build_all()
    record = read_record(made.store, 1)
    commit(made.store, replace(record, n_void=1))
    with pytest.raises(CorruptObjectError, match="shard 1 has 2 void rows, its record says 1"):
        next(iter(made.open().stream([WIDE], batch_size=32)))


def test_a_dataset_of_voids_alone_is_refused(make: Make) -> None:
    ds = make(100, voids=frozenset(range(100))).build_all().open()
    with pytest.raises(BadInputError, match="every committed row is void"):
        ds.stream([WIDE])


def test_batches_are_owned_contiguous_and_writable(ds: ActivationDataset) -> None:
    batches = list(ds.stream(BOTH, batch_size=50, drop_last=False, buffer_bytes=SMALL))
    pointers = set()
    for batch in batches:
        for tensor in (*batch.activations.values(), batch.row, batch.token_id):
            assert tensor.is_contiguous()
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            assert tensor.data_ptr() not in pointers
            pointers.add(tensor.data_ptr())
    batches[0][WIDE].fill_(7.0)
    for batch in batches[1:]:
        assert same_bits(batch[WIDE], ds[WIDE][batch.row.numpy()])


def test_memory_is_used_again_only_after_every_view_of_it_is_gone(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=64, epochs=None, buffer_bytes=SMALL)
    kept: list[tuple[Any, torch.Tensor]] = []
    for n, batch in enumerate(itertools.islice(stream, 60)):
        if n % 3 == 0:
            # A row view, a numpy view and a transposed view: each keeps the batch's memory.
            view = [batch[WIDE][:1], batch[WIDE].view(torch.int16).numpy(), batch[WIDE].t()][n % 9 // 3]
            kept.append((view, batch[WIDE].clone()))
    for view, copy in kept:
        found = torch.from_numpy(view).view(torch.bfloat16) if isinstance(view, np.ndarray) else view
        wanted = copy.t() if found.shape == copy.t().shape else copy[: len(found)]
        assert torch.equal(found.contiguous().view(torch.int16), wanted.contiguous().view(torch.int16))


def test_memory_comes_back_when_its_tensors_are_dropped() -> None:
    array = make_spec().arrays()[WIDE]
    memory = Memory()
    # Held here, so that an allocator cannot give the same place to another array.
    rows = memory.take(array, 64)
    tensor = to_tensor(memory.lend(rows))[3:]
    assert not np.shares_memory(memory.take(array, 64), rows)
    del tensor
    assert not np.shares_memory(memory.take(array, 32), rows)
    assert np.shares_memory(memory.take(array, 64), rows)
    tensor = to_tensor(memory.lend(rows))
    memory.close()
    del tensor
    assert not np.shares_memory(memory.take(array, 64), rows)


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
    state = stream.state_dict()
    assert state["row"] <= len(wanted)
    stream.load_state_dict({**state, "row": len(taken)})
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": []}, "no hook point given"),
        ({"points": ["layers.9.resid_post"]}, r"layer 9 is out of range; the layers are 3\.\.3"),
        ({"points": ["rows/token_id"]}, "no hook point 'rows/token_id'"),
        ({"batch_size": 0}, "batch_size = 0 must be > 0"),
        ({"epochs": 0}, "epochs = 0 must be > 0; None"),
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": 869}, "868 rows make no batch of 869"),
        ({"buffer_bytes": "lots"}, "'lots' is no size in bytes"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(
    ds: ActivationDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        ds.stream(**({"points": [WIDE]} | options))


def test_a_stream_works_on_any_file_system(place: str) -> None:
    ds = Made(place, 868).build_all().open()
    stream = ds.stream(BOTH, batch_size=100, drop_last=False)
    assert sorted(flat(list(stream))) == list(range(868))
    assert place.rsplit("/", 1)[-1] in repr(stream)
    assert "868 rows, batches of 100" in repr(stream)


def test_an_incomplete_dataset_streams_its_committed_shards(make: Make) -> None:
    ds = make().build(3, 1).open()
    assert sorted(flat(list(ds.stream([WIDE], batch_size=4)))) == [*range(256, 512), *range(768, 868)]


def test_the_url_is_all_that_another_process_needs(ds: ActivationDataset) -> None:
    batch = next(iter(actlake.open(ds.url).stream([WIDE], batch_size=8)))
    assert batch.row.tolist() == next(iter(ds.stream([WIDE], batch_size=8))).row.tolist()
