"""Datasets as a Ray Data source: every row once with its stored bits, in an order of the seed's, as Ray Train reads."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import ray
import torch
from formula_dataset import BOTH, NARROW, WIDE, Made, make_spec

import actlake
from actlake.jobs.ray_data import ActivationSource, ray_dataset
from actlake.storage.errors import BadInputError, UncommittedShardError, UnknownNameError

# Ray Data warns of settings of its own when it first makes its context.
pytestmark = pytest.mark.filterwarnings("ignore:`use_.*` is deprecated:DeprecationWarning")

VOIDS = frozenset({0, 300, *range(512, 600), 867})


@pytest.fixture(scope="module")
def ds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Made(str(tmp_path_factory.mktemp("ray") / "data"), 868, voids=VOIDS).build_all().open()


def blocks_of(origin: Any, points: Any = BOTH, parallelism: int = 3, **options: Any) -> list[Any]:
    """All blocks, read in this process."""
    settings: dict[str, Any] = {"batch_rows": 100, "seed": 0, "dtype": "float32"} | options
    source = ActivationSource(origin, points, **settings)
    return [block for task in source.get_read_tasks(parallelism) for block in task()]


def rows_in(blocks: list[Any]) -> list[list[int]]:
    return [block["row"].to_pylist() for block in blocks]


def test_the_rows_come_once_with_their_stored_values(ds: Any) -> None:
    blocks = blocks_of(ds)
    assert sorted(row for rows in rows_in(blocks) for row in rows) == [row for row in range(868) if row not in VOIDS]
    # Units of 64 rows, two of them a block.
    assert len(blocks) == 7
    assert max(map(len, rows_in(blocks))) <= 128
    for block in blocks:
        rows = block["row"].to_numpy()
        assert np.array_equal(block["token_id"].to_numpy(), rows * 7 % 1009)
        assert np.array_equal(block["position"].to_numpy(), rows % 97)
        assert np.array_equal(block["sequence"].to_numpy(), rows // 97)
        assert rows.tolist() != sorted(rows.tolist())


def test_the_order_is_the_seeds_whatever_the_number_of_tasks(ds: Any) -> None:
    wanted = rows_in(blocks_of(ds))
    for parallelism in (1, 2, 50):
        assert rows_in(blocks_of(ds, parallelism=parallelism)) == wanted
    assert len(ActivationSource(ds, WIDE, batch_rows=100, seed=0, dtype="float32").get_read_tasks(4)) == 4
    assert rows_in(blocks_of(ds, seed=1)) != wanted


def test_a_view_and_aligned_datasets_are_read_alike(ds: Any, tmp_path: Path) -> None:
    rows = sorted(row for rows in rows_in(blocks_of(ds.where(position=(40, None)))) for row in rows)
    assert rows == [row for row in range(868) if row % 97 >= 40 and row not in VOIDS]
    other = Made(str(tmp_path / "other"), 868, spec=make_spec(model="other"), voids=frozenset({5})).build(1, 0).open()
    both = actlake.align(base=ds, chat=other)
    found = blocks_of(both, [f"base:{WIDE}", f"chat:{WIDE}"])
    rows = sorted(row for rows in rows_in(found) for row in rows)
    assert rows == [row for row in range(512) if row not in {*VOIDS, 5}]
    assert found[0].column_names[:2] == [f"base:{WIDE}", f"chat:{WIDE}"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"points": []}, BadInputError, "no hook point given"),
        ({"points": "layers.9.resid_post"}, UnknownNameError, "layer 9 is out of range"),
        ({"batch_rows": 0}, BadInputError, "batch_rows = 0 must be > 0"),
        ({"seed": -1}, BadInputError, "seed = -1 must be in"),
        ({"dtype": "bfloat16"}, BadInputError, "dtype = 'bfloat16' is not one of float32, uint16"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(
    ds: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ray_dataset(ds, **({"points": WIDE} | options))


def test_a_dataset_without_a_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UncommittedShardError, match="no committed shard yet"):
        ray_dataset(Made(str(tmp_path / "empty"), 868).open(), WIDE)


# --- in a cluster ---


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_reads_it_in_parallel_for_torch(ds: Any) -> None:
    found = ray_dataset(ds, BOTH, batch_rows=100)
    rows = []
    for batch in found.iter_torch_batches(batch_size=64):
        assert (batch[WIDE].dtype, batch[WIDE].shape[1], batch[NARROW].shape[1]) == (torch.float32, 12, 4)
        numbers = batch["row"].numpy()
        for point in BOTH:
            assert np.array_equal(batch[point].numpy(), np.asarray(ds[point][numbers], dtype=np.float32))
        rows += numbers.tolist()
    assert sorted(rows) == [row for row in range(868) if row not in VOIDS]


@pytest.mark.usefixtures("ray_cluster")
def test_the_bits_of_bfloat16_and_shares_of_workers_as_ray_train_gives_them(ds: Any) -> None:
    # What get_dataset_shard() returns in each worker of Ray Train.
    shares = ray_dataset(ds, WIDE, batch_rows=100, dtype="uint16").streaming_split(2, equal=False)
    rows = []

    # The reading tasks need the cluster's cores.
    @ray.remote(num_cpus=0)
    def take(share: Any) -> list[Any]:
        return [(batch["row"], batch[WIDE]) for batch in share.iter_batches(batch_size=50, batch_format="numpy")]

    for numbers, bits in (pair for found in ray.get([take.remote(share) for share in shares]) for pair in found):
        assert bits.dtype == np.uint16
        assert np.array_equal(bits.view(ml_dtypes.bfloat16), ds[WIDE][numbers])
        rows += numbers.tolist()
    assert sorted(rows) == [row for row in range(868) if row not in VOIDS]
