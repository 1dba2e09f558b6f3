"""The stream: every row once, the stored bits, the same order every time."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from formula_dataset import BOTH, NARROW, SMALL, WIDE, Made, flat, make_spec, rows_of, same_bits

import actlake
from actlake.shards.dataset import ActivationDataset
from actlake.storage.errors import BadInputError, CorruptObjectError, UnknownNameError
from actlake.storage.records import commit, read_record
from actlake.storage.spec import PointSpec

Make = Callable[..., Made]


@pytest.mark.parametrize("batch_size", [1, 7, 32, 64, 100, 256, 868, 1000])
@pytest.mark.parametrize("buffer_bytes", [0, 1, SMALL, "1GiB"])
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
    window = 2 * 1024 * 12 * 2
    for batch in ds.stream([WIDE], batch_size=256, buffer_bytes=window):
        assert len(np.unique(batch.row.numpy() // 32)) == 32
        assert len(np.unique(batch.row.numpy() // 256)) > 8


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": []}, "no hook point given"),
        ({"points": ["layers.9.resid_post"]}, r"layer 9 is out of range; the layers are 3\.\.3"),
        ({"points": ["rows/token_id"]}, "no hook point 'rows/token_id'"),
        ({"batch_size": 0}, "batch_size = 0 must be > 0"),
        ({"epochs": 0}, "epochs = 0 must be > 0; None"),
        ({"seed": -1}, "seed = -1"),
        ({"batch_size": 869}, "868 rows make no batch of 869 on each of 1 ranks"),
        ({"buffer_bytes": "lots"}, "'lots' is no size in bytes"),
        ({"batch_size": 2.5}, r"batch_size = 2\.5 is no whole number"),
        ({"batch_size": "10"}, "batch_size = '10' is no whole number"),
        ({"rank": 0, "world_size": 0}, "world_size = 0 must be > 0"),
        ({"rank": 0, "world_size": 1.0}, r"world_size = 1\.0 is no whole number"),
        ({"rank": 2, "world_size": 2}, r"rank = 2 is not in 0\.\.1"),
        ({"device": "cuda:99"}, "torch finds .* of cuda here"),
        ({"device": "gpu"}, "device = 'gpu' is none"),
        ({"batchsize": 10}, "no option 'batchsize'; did you mean 'batch_size'"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(
    ds: ActivationDataset, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInputError, match=message):
        ds.stream(**({"points": [WIDE]} | options))


def test_settings_may_be_numbers_of_numpy(ds: ActivationDataset) -> None:
    stream = ds.stream([WIDE], batch_size=np.int64(100), seed=np.uint8(3), rank=np.int32(0), world_size=np.int32(1))
    assert flat(list(stream)) == flat(list(ds.stream([WIDE], batch_size=100, seed=3)))
    assert json.loads(json.dumps(stream.state_dict())) == stream.state_dict()


def test_a_stream_works_on_any_file_system(place: str) -> None:
    ds = Made(place, 868).build_all().open()
    stream = ds.stream(BOTH, batch_size=100, drop_last=False)
    assert sorted(flat(list(stream))) == list(range(868))
    assert place.rsplit("/", 1)[-1] in repr(stream)
    assert "batches of 100, seed 0; 9 delivered" in repr(stream)


def test_an_incomplete_dataset_streams_its_committed_shards(make: Make) -> None:
    ds = make().build(3, 1).open()
    assert sorted(flat(list(ds.stream([WIDE], batch_size=4)))) == [*range(256, 512), *range(768, 868)]


def test_the_url_is_all_that_another_process_needs(ds: ActivationDataset) -> None:
    batch = next(iter(actlake.open(ds.url).stream([WIDE], batch_size=8)))
    assert batch.row.tolist() == next(iter(ds.stream([WIDE], batch_size=8))).row.tolist()
