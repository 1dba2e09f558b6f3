"""Sampled covariances, and statistics from the rows."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from formula_dataset import NARROW, WIDE, Made

from actlake.shards.covariance import compute_covariance, covariance_key, read_covariance, write_covariance
from actlake.shards.dataset import ActivationDataset
from actlake.shards.recompute import statistics_from_rows
from actlake.shards.verify import verify
from actlake.storage.errors import BadInputError, CorruptObjectError, NotFoundError, SpecMismatchError, UnknownNameError
from actlake.storage.moments import to_parquet

Make = Callable[..., Made]


def test_over_all_rows_it_is_numpys(ds: ActivationDataset) -> None:
    heard: list[int] = []
    found = compute_covariance(ds, WIDE, n_rows=868, on_rows=heard.append)
    rows = ds[WIDE][:].astype(np.float64)
    assert (found.n_rows, found.n_rows_of, sum(heard)) == (868, 868, 868)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-9)
    eigenvalues = np.linalg.eigvalsh(found.covariance)
    assert found.effective_rank == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-9)


def test_a_sample_is_of_whole_chunks_and_follows_from_the_seed(make: Make) -> None:
    ds = make(voids=frozenset(range(300, 420))).build(1, 3).open()
    one, same, other = (compute_covariance(ds, WIDE, n_rows=100, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.covariance, same.covariance)
    assert not np.array_equal(one.covariance, other.covariance)
    # All of them: 256 + 100 rows are committed, of which 120 are void.
    everything = compute_covariance(ds, WIDE, n_rows=10_000, seed=5)
    kept = np.setdiff1d(np.concatenate([np.arange(256, 512), np.arange(768, 868)]), np.arange(300, 420))
    assert everything.n_rows == len(kept)
    rows = ds[WIDE][kept].astype(np.float64)
    np.testing.assert_allclose(everything.covariance, np.cov(rows.T, bias=True), rtol=1e-9, atol=1e-9)


def test_it_is_stored_beside_the_dataset_and_read_again(ds: ActivationDataset) -> None:
    found = compute_covariance(ds, WIDE, n_rows=100, seed=3)
    key = write_covariance(ds, WIDE, found)
    assert key == covariance_key(WIDE) == "stats/covariance/layers.3.resid_post.parquet"
    again = read_covariance(ds, WIDE)
    assert np.array_equal(again.covariance, found.covariance)
    assert np.array_equal(again.mean, found.mean)
    assert (again.n_rows, again.n_rows_of, again.seed) == (found.n_rows, 868, 3)
    assert verify(ds).problems == ()
    assert ds.statistics(WIDE).count == 868


def test_what_is_not_there_or_damaged_or_of_another_point(ds: ActivationDataset) -> None:
    with pytest.raises(NotFoundError, match=f"--covariance {WIDE}' computes it"):
        read_covariance(ds, WIDE)
    write_covariance(ds, WIDE, compute_covariance(ds, WIDE))
    data = bytearray(ds.store.read(covariance_key(WIDE)))
    ds.store.write(covariance_key(NARROW), bytes(data))
    with pytest.raises(SpecMismatchError, match=r"is of layers\.3\.resid_post"):
        read_covariance(ds, NARROW)
    data[200] ^= 1
    for damaged in (bytes(data), bytes(data[:100]), b""):
        ds.store.write(covariance_key(WIDE), damaged)
        with pytest.raises(CorruptObjectError, match="is damaged"):
            read_covariance(ds, WIDE)
    with pytest.raises(UnknownNameError):
        read_covariance(ds, "layers.3.resid_pots")


def test_nothing_to_take_it_from(make: Make) -> None:
    made = make(n_rows=100, voids=frozenset(range(100)))
    with pytest.raises(BadInputError, match="no committed row"):
        compute_covariance(made.open(), WIDE)
    with pytest.raises(BadInputError, match="not void"):
        compute_covariance(made.build_all().open(), WIDE)
    with pytest.raises(BadInputError, match="n_rows = 0"):
        compute_covariance(made.open(), WIDE, n_rows=0)


def test_statistics_from_the_rows_are_those_that_were_stored(make: Make) -> None:
    ds = make(voids=frozenset({3, 300, 301})).build(0, 1, 3).open()
    heard: list[int] = []
    for point in ds.hook_points:
        found, stored = statistics_from_rows(ds, point, on_rows=heard.append), ds.statistics(point)
        assert to_parquet({"x": found}) == to_parquet({"x": replace(stored, n_nonfinite=0)})
    assert sum(heard) == 2 * ds.n_rows
