"""order="sequence": the rows in the corpus's order again, whatever blocks they were shuffled in."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from formula_dataset import BOTH, NARROW, WIDE, Made, flat, make_spec, rows_of, same_bits

from actlake.shards.dataset import ActivationDataset
from actlake.storage.errors import BadInputError
from actlake.storage.spec import PointSpec

Make = Callable[..., Made]

OPTIONS: dict[str, Any] = {"batch_size": 50, "order": "sequence", "drop_last": False}


def corpus_order(ds: ActivationDataset) -> list[int]:
    """Row numbers in corpus order, by the row space's own arithmetic."""
    space = ds.spec.row_space(ds.n_rows_planned)
    shards = ds.reader.manifest.shards
    return [space.rows_of(shard).start + place for shard in shards for place in space.places(shard).tolist()]


def layout(block: int, narrow: int, wide: int, **changes: Any) -> Any:
    points = (
        PointSpec(name=NARROW, width=4, rows_per_chunk=narrow),
        PointSpec(name=WIDE, width=12, rows_per_chunk=wide),
    )
    return make_spec(hook_points=points, rows_per_block=block, **changes)


@pytest.mark.parametrize("batch_size", [1, 50, 64, 2000])
@pytest.mark.parametrize(
    ("block", "narrow", "wide"),
    [(128, 64, 32), (32, 64, 32), (64, 256, 128), (256, 256, 256), (256, 8, 16), (16, 64, 16)],
)
def test_rows_come_in_corpus_order(make: Make, block: int, narrow: int, wide: int, batch_size: int) -> None:
    ds = make(spec=layout(block, narrow, wide)).build_all().open()
    batches = list(ds.stream(BOTH, **(OPTIONS | {"batch_size": batch_size})))
    assert flat(batches) == corpus_order(ds)
    for batch in batches[:: max(1, len(batches) // 20)]:
        row = batch.row.numpy()
        assert all(same_bits(batch[point], ds[point][row]) for point in BOTH)
        assert batch.sequence.tolist() == (row // 97).tolist()


def test_a_dataset_that_was_never_shuffled_comes_as_it_is(make: Make) -> None:
    ds = make(spec=make_spec(order="sequence")).build_all().open()
    assert flat(list(ds.stream(BOTH, **OPTIONS))) == list(range(868))


def test_epochs_are_alike_and_a_seed_changes_nothing(ds: ActivationDataset) -> None:
    epochs = list(ds.stream(WIDE, **(OPTIONS | {"epochs": 2, "seed": 5})))
    assert flat(epochs) == corpus_order(ds) * 2


def test_voids_filters_and_missing_shards_leave_gaps(make: Make) -> None:
    voids = frozenset({0, 31, 300, *range(640, 768), 867})
    ds = make(voids=voids).build(0, 2, 3).open()
    wanted = [row for row in corpus_order(ds) if row not in voids]
    assert flat(list(ds.stream(BOTH, **OPTIONS))) == wanted
    view = ds.where(position=(30, 60))
    assert flat(list(view.stream(BOTH, **OPTIONS))) == [row for row in wanted if 30 <= row % 97 < 60]


@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_have_runs_of_the_order(ds: ActivationDataset, n_ranks: int) -> None:
    streams = [ds.stream(WIDE, **OPTIONS, rank=rank, world_size=n_ranks) for rank in range(n_ranks)]
    assert list(itertools.chain(*(flat(list(stream)) for stream in streams))) == corpus_order(ds)


def test_batches_do_not_depend_on_the_buffer_and_a_state_goes_on_with_another(ds: ActivationDataset) -> None:
    wanted = rows_of(list(ds.stream(WIDE, **OPTIONS)))
    small = ds.stream(WIDE, **OPTIONS, buffer_bytes=2 * 128 * 24)
    assert rows_of(list(itertools.islice(small, 3))) == wanted[:3]
    again = ds.stream(WIDE, **OPTIONS)
    again.load_state_dict(small.state_dict())
    assert rows_of(list(again)) == wanted[3:]


def test_a_block_that_does_not_fit_the_buffer_is_refused_with_the_size_that_fits(ds: ActivationDataset) -> None:
    needed = 2 * 128 * (12 + 4) * 2
    with pytest.raises(BadInputError, match=f"buffer_bytes is {needed - 1:,}: give buffer_bytes={needed}, or fewer"):
        ds.stream(BOTH, **OPTIONS, buffer_bytes=needed - 1)
    rows = flat(list(ds.stream(BOTH, **OPTIONS, buffer_bytes=needed)))
    assert np.array_equal(rows, corpus_order(ds))
