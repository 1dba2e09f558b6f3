"""Opening and indexing: what is read equals the formula, and nothing more is read than needed."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from formula_dataset import NARROW, WIDE, Made, bits, make_spec

import actlake
from actlake.storage.errors import (
    BadInputError,
    CorruptObjectError,
    FormatVersionError,
    MissingExtraError,
    MissingObjectError,
    NotFoundError,
    RowRangeError,
    UncommittedShardError,
    UnknownNameError,
)
from actlake.storage.records import stats_key
from actlake.storage.spec import PointSpec
from actlake.storage.stores import Store

Make = Callable[..., Made]

KEYS: list[Any] = [
    5,
    -1,
    np.int64(300),
    slice(None),
    slice(100, 200),
    slice(64, 128),
    slice(250, 262),
    slice(800, 10_000),
    slice(700, 20, -7),
    slice(0, 868, 90),
    slice(5, 5),
    ...,
    [3, 700, 5],
    [5, 5, 5],
    [-1, 0, -868],
    [],
    np.array([867, 0, 255, 256], dtype=np.uint16),
    np.arange(868)[::-1],
    [i ^ 1 for i in range(32)],
]


@pytest.fixture
def made(place: str) -> Made:
    return Made(place, 868).build_all()


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_every_kind_of_key_selects_as_numpy_does(made: Made, key: Any) -> None:
    ds = made.open()
    for name in (WIDE, NARROW, *(f"rows/{c}" for c in ("token_id", "position", "sequence", "role"))):
        wanted = made.values(name, np.arange(868))[np.array(key, dtype=np.int64) if isinstance(key, list) else key]
        found = ds[name][key]
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert np.array_equal(bits(np.asarray(found)), bits(np.asarray(wanted)))


def test_a_view_says_what_it_is(made: Made) -> None:
    view = made.open()[WIDE]
    assert view.shape == (868, 12)
    assert view.dtype == ml_dtypes.bfloat16
    assert len(view) == 868
    assert view.ndim == 2
    assert WIDE in repr(view)
    everything = made.values(WIDE, np.arange(868))
    assert np.array_equal(bits(np.stack(list(view))), bits(everything))
    assert np.array_equal(np.asarray(view, dtype=np.float32), everything.astype(np.float32))


def test_tensors_have_the_stored_bits(made: Made) -> None:
    ds = made.open()
    found = ds.tensor(WIDE, slice(100, 200))
    assert found.dtype == torch.bfloat16
    assert np.array_equal(found.view(torch.int16).numpy(), ds[WIDE][100:200].view(np.int16))
    assert ds.tensor(WIDE, 7).shape == (12,)
    assert ds.tensor("rows/token_id", [3, 1]).tolist() == [21, 7]
    assert ds.tensor("rows/role", 3).shape == ()


def test_float32_datasets_stay_float32(local: str) -> None:
    made = Made(local, 300, spec=make_spec(dtype="float32")).build_all()
    ds = made.open()
    assert ds[WIDE].dtype == np.float32
    assert np.array_equal(ds[WIDE][:], made.values(WIDE, np.arange(300)))
    assert ds.tensor(WIDE, [1]).dtype == torch.float32
    (batch,) = ds.stream([WIDE], batch_size=300)
    assert np.array_equal(batch[WIDE].numpy(), ds[WIDE][batch.row.numpy()])


def test_row_columns_come_without_activations(made: Made, reads: list[str]) -> None:
    ds = made.open()
    reads.clear()
    rows = ds.rows([700, 3])
    assert {name: column.tolist() for name, column in rows.items()} == {
        "token_id": [700 * 7 % 1009, 21],
        "position": [700 % 97, 3],
        "sequence": [7, 0],
        "role": [0, 0],
    }
    assert not [key for key in reads if "layers" in key]


def test_only_the_chunks_needed_are_read_and_each_once(make: Make, reads: list[str]) -> None:
    ds = make().build_all().open()
    reads.clear()
    ds[WIDE][[40, 300, 41, 63, 40]]
    objects = [f"arrays/{WIDE}/c/{shard}/0" for shard in (0, 1)]
    # An index and a chunk of each of two shards.
    assert sorted(reads) == sorted(objects * 2)
    reads.clear()
    ds[WIDE][32:96]
    assert reads == [objects[0]] * 2
    reads.clear()
    ds[WIDE][10:10]
    assert reads == []


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys that are read from here on, in order."""
    keys: list[str] = []
    read, read_range, read_ranges = Store.read, Store.read_range, Store.read_ranges

    def noted_read(self: Store, key: str, most: int | None = None) -> bytes:
        keys.append(key)
        return read(self, key, most)

    def noted_range(self: Store, key: str, start: int, stop: int) -> bytes:
        keys.append(key)
        return read_range(self, key, start, stop)

    def noted_ranges(self: Store, key: str, spans: list[tuple[int, int]]) -> list[memoryview]:
        keys.append(key)
        return read_ranges(self, key, spans)

    monkeypatch.setattr(Store, "read", noted_read)
    monkeypatch.setattr(Store, "read_range", noted_range)
    monkeypatch.setattr(Store, "read_ranges", noted_ranges)
    return keys


@pytest.mark.parametrize("key", [868, -869, [0, 868], np.array([10**12])], ids=str)
def test_a_row_out_of_range_is_an_index_error_that_says_the_range(make: Make, key: Any) -> None:
    view = make().build_all().open()[WIDE]
    with pytest.raises(RowRangeError, match=r"layers\.3\.resid_post: row -?\d+ is out of range; the rows are 0\.\.867"):
        view[key]
    assert issubclass(RowRangeError, IndexError)


@pytest.mark.parametrize("key", [1.5, "a", None, (3, 4), [[1, 2]], np.ones(868, dtype=bool), [1.0]], ids=range(7))
def test_a_key_of_another_kind_is_refused(make: Make, key: Any) -> None:
    view = make().build_all().open()[WIDE]
    with pytest.raises(BadInputError, match="a number, a slice or a list"):
        view[key]


def test_an_incomplete_dataset_reads_its_committed_shards_and_names_the_others(make: Make) -> None:
    made = make().build(0, 3)
    ds = made.open()
    assert (ds.n_rows, ds.n_rows_planned, ds.complete, ds.missing_shards) == (356, 868, False, [1, 2])
    assert np.array_equal(bits(ds[WIDE][-100:]), bits(made.values(WIDE, np.arange(768, 868))))
    with pytest.raises(UncommittedShardError, match=r"row 259 is in shard 1, which is not committed; 'actlake ingest'"):
        ds[WIDE][250:260]
    with pytest.raises(UncommittedShardError, match="shard 2"):
        ds[WIDE][[0, 600]]
    with pytest.raises(UncommittedShardError):
        list(ds["rows/token_id"])


def test_a_short_shard_that_is_planned_longer_reads_what_it_has(local: str) -> None:
    Made(local, 300).build_all()
    grown = Made(local, 868)
    ds = grown.open()
    assert ds.missing_shards == [1, 2, 3]
    assert np.array_equal(bits(ds[WIDE][:300]), bits(grown.values(WIDE, np.arange(300))))
    with pytest.raises(UncommittedShardError, match=r"row 300 is in shard 1, which has 44 of its 256 rows"):
        ds[WIDE][290:301]


def test_void_rows_read_as_zeros(make: Make) -> None:
    ds = make(voids=frozenset({3, 300})).build_all().open()
    assert not ds[WIDE][[3, 300]].astype(np.float32).any()
    assert ds["rows/role"][[2, 3, 300]].tolist() == [0, 255, 255]
    assert ds.n_rows == 868


def test_opening_says_what_is_there(made: Made) -> None:
    ds = made.open()
    assert ds.url == made.store.url
    assert ds.spec == made.spec
    assert ds.hook_points == (NARROW, WIDE)
    assert list(ds) == [NARROW, WIDE]
    assert WIDE in ds
    assert "layers.4.resid_post" not in ds
    assert (ds.n_rows, ds.n_rows_planned, ds.complete, ds.missing_shards) == (868, 868, True, [])
    assert ds.manifest["n_rows"].to_pylist() == [256, 256, 256, 100]
    text = repr(ds)
    assert all(part in text for part in (ds.url, "formula", "868 of 868 in 4 shards, complete", WIDE, "x compressed"))
    assert "3 shards missing" in repr(Made(made.url, 1500).open())


def test_an_empty_dataset_opens_and_says_so(make: Make) -> None:
    ds = make().open()
    assert (ds.n_rows, ds.missing_shards) == (0, [0, 1, 2, 3])
    assert "0 of 868 in 0 shards, 4 shards missing" in repr(ds)
    assert ds.statistics(WIDE).count == 0
    with pytest.raises(UncommittedShardError, match="no committed shard yet"):
        ds.stream([WIDE])


def test_nothing_there_is_not_found(place: str) -> None:
    with pytest.raises(NotFoundError, match="no dataset at"):
        actlake.open(place)


def test_a_newer_format_is_refused(made: Made) -> None:
    text = made.store.read("spec.json").replace(b'"format_version": 1', b'"format_version": 99')
    made.store.write("spec.json", text)
    with pytest.raises(FormatVersionError, match="99"):
        made.open()


def test_an_unknown_array_names_the_nearest(made: Made) -> None:
    ds = made.open()
    with pytest.raises(UnknownNameError, match=f"did you mean '{WIDE}'"):
        ds["layers.3.resid_pos"]
    with pytest.raises(UnknownNameError, match=f"did you mean '{NARROW}'"):
        ds.statistics("layers.3.mlp_ou")


def test_the_heldout_split_is_a_dataset_of_its_own(place: str) -> None:
    made = Made(place, 868).build_all()
    with pytest.raises(NotFoundError, match="no held-out split"):
        _ = made.open().heldout
    held = Made(f"{place}/heldout", 100, spec=make_spec(split="heldout"), offset=1.0).build_all()
    found = made.open().heldout
    assert found.spec.split == "heldout"
    assert np.array_equal(bits(found[WIDE][:]), bits(held.values(WIDE, np.arange(100))))


def test_a_dataset_pickles_as_its_place(made: Made) -> None:
    ds = pickle.loads(pickle.dumps(made.open()))
    assert np.array_equal(bits(ds[WIDE][:]), bits(made.values(WIDE, np.arange(868))))


def test_statistics_are_those_of_the_rows(place: str) -> None:
    made = Made(place, 868, voids=frozenset(range(10, 40))).build_all()
    moments = made.open().statistics(WIDE)
    rows = made.values(WIDE, np.array([row for row in range(868) if row not in made.voids])).astype(np.float64)
    assert moments.count == 838
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.norm_mean, np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


def test_statistics_do_not_depend_on_the_order_of_commits(local: str, tmp_path: Any) -> None:
    one = Made(local, 868).build(0, 1, 2, 3).open().statistics(WIDE)
    other = Made(str(tmp_path / "other"), 868).build(2, 3, 0, 1).open().statistics(WIDE)
    assert one.m2.tobytes() == other.m2.tobytes()
    assert one.mean.tobytes() == other.mean.tobytes()


def test_damaged_statistics_are_not_used(made: Made) -> None:
    data = bytearray(made.store.read(stats_key(1)))
    data[40] ^= 1
    made.store.write(stats_key(1), bytes(data))
    with pytest.raises(CorruptObjectError, match=r"shard 1, stats/0000000001\.parquet.*crc32c 0x.*found .*--repair"):
        made.open().statistics(WIDE)
    made.store.delete(stats_key(1))
    with pytest.raises(MissingObjectError, match=r"shard 1, stats/0000000001\.parquet"):
        made.open().statistics(WIDE)


def test_chunks_that_do_not_nest_read_and_stream(local: str) -> None:
    points = (
        PointSpec(name=NARROW, width=3, rows_per_chunk=20),
        PointSpec(name=WIDE, width=5, rows_per_chunk=30),
    )
    spec = make_spec(hook_points=points, rows_per_shard=240, rows_per_block=240)
    made = Made(local, 500, spec=spec).build_all()
    ds = made.open()
    assert np.array_equal(bits(ds[WIDE][:]), bits(made.values(WIDE, np.arange(500))))
    for batch in ds.stream([NARROW, WIDE], batch_size=7, buffer_bytes=1):
        for point in (NARROW, WIDE):
            wanted = made.values(point, batch.row.numpy())
            assert np.array_equal(batch[point].view(torch.int16).numpy(), wanted.view(np.int16))


def test_reading_without_torch_names_the_remedy(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = make().build_all().open()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert ds[WIDE][0].shape == (12,)
    with pytest.raises(MissingExtraError, match="pip install torch"):
        ds.stream([WIDE])
    with pytest.raises(MissingExtraError, match="pip install torch"):
        ds.tensor(WIDE, 0)


def test_the_package_offers_its_names_and_loads_them_late() -> None:
    code = (
        "import sys, actlake; assert 'numpy' not in sys.modules; assert dir(actlake) == sorted(actlake.__all__);"
        "print(*(type(getattr(actlake, name)).__name__ for name in actlake.__all__));"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.split()[:4] == ["type", "type", "type", "str"]
    assert set(done.stdout.split()[4:]) == {"function"}
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        getattr(actlake, "opne")  # noqa: B009
