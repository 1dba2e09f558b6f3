"""Streams in torch's DataLoader and torchdata's StatefulDataLoader, with and without processes of their own."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from formula_dataset import BOTH, SMALL, WIDE, Made, flat, rows_of, same_bits
from torch.utils.data import DataLoader

from actlake.shards.batch import TokenBatch
from actlake.shards.dataset import ActivationDataset
from actlake.shards.stream import ActivationStream

Make = Callable[..., Made]

pytestmark = [
    # Forks of a process with threads are what is tested here; Python 3.12 warns of them.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    # On a machine of two cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning"),
    # Of torchdata 0.11 under newer torch.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]


@pytest.fixture
def on_disk(local: str) -> ActivationDataset:
    return Made(local, 868).build_all().open()


def stream_of(ds: ActivationDataset, **options: Any) -> ActivationStream:
    return ds.stream(BOTH, **({"batch_size": 50, "buffer_bytes": SMALL} | options))


def loader_of(stream: ActivationStream, n_workers: int, context: str | None = None, **options: Any) -> Any:
    return DataLoader(stream, batch_size=None, num_workers=n_workers, multiprocessing_context=context, **options)


@pytest.mark.parametrize(
    ("n_workers", "context"),
    [(0, None), (1, "fork"), (2, "fork"), (3, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_loader_delivers_the_streams_batches(
    on_disk: ActivationDataset, n_workers: int, context: str | None, drop_last: bool
) -> None:
    stream = stream_of(on_disk, drop_last=drop_last)
    wanted = rows_of(list(stream_of(on_disk, drop_last=drop_last)))
    loader = loader_of(stream, n_workers, context)
    batches: list[TokenBatch] = list(loader)
    assert len(loader) == len(batches)
    assert sorted(rows_of(batches)) == sorted(wanted)
    for batch in batches:
        row = batch.row.numpy()
        assert all(same_bits(batch[point], on_disk[point][row]) for point in BOTH)
        assert batch.position.tolist() == (row % 97).tolist()
    if n_workers < 2:
        assert rows_of(batches) == wanted


def test_the_processes_of_two_ranks_share_all_rows(on_disk: ActivationDataset) -> None:
    loaders = [loader_of(stream_of(on_disk, rank=rank, world_size=2), 2, "fork") for rank in range(2)]
    one, other = (list(loader) for loader in loaders)
    assert len(one) == len(other) == 8
    rows = flat(one) + flat(other)
    assert len(rows) == len(set(rows)) == 800


def test_processes_that_stay_reshuffle_and_new_ones_begin_again(on_disk: ActivationDataset) -> None:
    lasting = loader_of(stream_of(on_disk), 2, "fork", persistent_workers=True)
    assert [sorted(rows_of(list(lasting))) for _ in range(2)] == [
        sorted(rows_of(list(itertools.islice(stream_of(on_disk, epochs=2), 17 * epoch, 17 * (epoch + 1)))))
        for epoch in range(2)
    ]
    # The stream of this process does not move: what a plain loader with processes loses.
    fresh = loader_of(stream_of(on_disk), 1, "fork")
    assert rows_of(list(fresh)) == rows_of(list(fresh))


def test_an_endless_stream_of_fewer_batches_than_processes_does_not_starve_any(local: str) -> None:
    ds = Made(local, 20).build_all().open()
    loader = loader_of(ds.stream(WIDE, batch_size=30, epochs=None), 3, "fork")
    found = flat(list(itertools.islice(loader, 12)))
    assert len(found) == 360
    assert set(found) == set(range(20))


def test_a_loader_goes_on_from_where_the_stream_was(on_disk: ActivationDataset) -> None:
    stream = stream_of(on_disk)
    done = rows_of(list(itertools.islice(stream, 5)))
    later = list(loader_of(stream, 2, "fork"))
    assert sorted(done + rows_of(later)) == sorted(rows_of(list(stream_of(on_disk))))


def test_a_batch_pickles_with_its_row_columns(ds: ActivationDataset) -> None:
    for batch in ds.stream(BOTH, batch_size=100, drop_last=False):
        for twin in (pickle.loads(pickle.dumps(batch)), copy.deepcopy(batch)):
            for column in ("row", "token_id", "position", "sequence", "role"):
                assert torch.equal(getattr(twin, column), getattr(batch, column))
            assert all(torch.equal(twin[point], batch[point]) for point in BOTH)


@pytest.mark.parametrize("n_workers", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"epochs": None}])
def test_a_stateful_loader_resumes_exactly(on_disk: ActivationDataset, n_workers: int, options: dict[str, Any]) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader() -> Any:
        context = "fork" if n_workers else None
        stream = stream_of(on_disk, **options)
        return StatefulDataLoader(stream, batch_size=None, num_workers=n_workers, multiprocessing_context=context)

    first = loader()
    batches, states = [], []
    for batch in itertools.islice(first, 14):
        batches.append(batch.row.tolist())
        states.append(copy.deepcopy(first.state_dict()))
    del first
    for step in (1, 2, 7, 13):
        again = loader()
        again.load_state_dict(pickle.loads(pickle.dumps(states[step - 1])))
        assert rows_of(list(itertools.islice(again, 14 - step))) == batches[step:]
