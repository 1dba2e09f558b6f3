import io
import itertools
import math
import tracemalloc

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.errors import DataError
from actlake.storage.moments import Moments, fold, fold_list, from_parquet, of_shard, to_parquet
from actlake.storage.norms import N_OUTLIERS, NormHistogram

# Channels of very different size and offset, as in a residual stream: one holds most of the energy.
SCALE = np.array([1.0, 1e-3, 300.0, 1.0, 5.0])
OFFSET = np.array([0.0, 1.0, -4000.0, 1e4, 0.0])


def rows_of(n: int, start: int = 0) -> npt.NDArray[np.float32]:
    i = np.arange(start, start + n)[:, None]
    return np.asarray(np.sin(i * np.array([1.1, 2.3, 0.7, 3.1, 0.0]) + 1) * SCALE + OFFSET, dtype=np.float32)


def close(left: Moments, right: Moments, rel: float) -> None:
    assert left.count == right.count
    np.testing.assert_allclose(left.mean, right.mean, rtol=rel, atol=rel)
    np.testing.assert_allclose(left.m2, right.m2, rtol=rel, atol=rel)
    assert left.norm_mean == pytest.approx(right.norm_mean, rel=rel)


def same_bits(left: Moments, right: Moments) -> bool:
    return to_parquet({"x": left}) == to_parquet({"x": right})


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_moments_agree_with_numpy_in_double_precision(dtype: npt.DTypeLike) -> None:
    rows = rows_of(5000).astype(dtype)
    exact = rows.astype(np.longdouble)
    parts = [Moments.of(rows[start : start + 700]) for start in range(0, 5000, 700)]
    for moments in (Moments.of(rows), fold_list(parts), fold(dict(enumerate(parts)), 5)):
        assert moments.count == 5000
        np.testing.assert_allclose(moments.mean, exact.mean(axis=0).astype(np.float64), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(moments.variance, exact.var(axis=0).astype(np.float64), rtol=1e-9, atol=1e-18)
        norms = np.sqrt((exact**2).sum(axis=1))
        assert moments.norm_mean == pytest.approx(float(norms.mean()), rel=1e-9)
        assert moments.mean_squared_norm == pytest.approx(float((norms**2).mean()), rel=1e-9)


@given(st.lists(st.integers(0, 40), min_size=3, max_size=3))
def test_merge_is_associative_within_rounding(sizes: list[int]) -> None:
    starts = [0, sizes[0], sizes[0] + sizes[1]]
    a, b, c = (Moments.of(rows_of(n, start)) for n, start in zip(sizes, starts, strict=True))
    close(a.merge(b).merge(c), a.merge(b.merge(c)), 1e-9)
    close(a.merge(b).merge(c), Moments.of(rows_of(sum(sizes))), 1e-9)


def test_no_rows_are_neutral_bit_for_bit() -> None:
    some, none = Moments.of(rows_of(10)), Moments.empty(5)
    assert same_bits(some.merge(none), some)
    assert same_bits(none.merge(some), some)
    assert same_bits(Moments.of(rows_of(0)), none)
    assert same_bits(fold({}, 5), none)
    assert none.variance.tolist() == [0.0] * 5
    assert none.mean_squared_norm == 0.0
    assert all(map(math.isnan, (none.median_norm, none.unit_scale, none.sqrt_d_scale)))
    assert none.outlier_channels() == ()
    assert none.outlier_rows == ()


def test_the_fold_does_not_see_the_order_of_arrival() -> None:
    parts = {shard: Moments.of(rows_of(50 + shard, 100 * shard)) for shard in (0, 1, 2, 4, 5)}
    folded = fold(parts, 5)
    for order in itertools.permutations(parts):
        assert same_bits(fold({shard: parts[shard] for shard in order}, 5), folded)


def test_the_tree_is_over_shard_numbers() -> None:
    parts = {shard: Moments.of(rows_of(50 + shard, 100 * shard)) for shard in (0, 1, 2, 4, 5)}
    by_hand = (parts[0].merge(parts[1]).merge(parts[2])).merge(parts[4].merge(parts[5]))
    assert same_bits(fold(parts, 5), by_hand)
    # A later shard leaves the inner nodes as they are.
    grown = parts | {9: Moments.of(rows_of(7))}
    assert same_bits(fold(grown, 5), by_hand.merge(grown[9]))


def test_fold_list_moves_an_odd_last_one_up() -> None:
    a, b, c, d, e = (Moments.of(rows_of(20, 20 * i)) for i in range(5))
    assert same_bits(fold_list([a, b, c, d, e]), a.merge(b).merge(c.merge(d)).merge(e))
    assert same_bits(fold_list([a]), a)


def test_absent_shards_cost_no_arrays() -> None:
    one = Moments.of(rows_of(3))
    tracemalloc.start()
    folded = fold({2**16 - 1: one}, 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert same_bits(folded, one)
    assert peak < 4e6  # 8 bytes a shard and level; two arrays a shard were 20 MB


def test_the_statistics_file_comes_back_exactly() -> None:
    moments = {"layers.0.mlp_in": Moments.of(rows_of(33)), "layers.1.mlp_in": Moments.empty(3)}
    data = to_parquet(moments)
    found = from_parquet(data)
    assert list(found) == list(moments)
    assert to_parquet(found) == data
    assert found["layers.0.mlp_in"].m2.tolist() == moments["layers.0.mlp_in"].m2.tolist()


def test_the_statistics_file_is_plain_parquet(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("stats") / "0.parquet"
    path.write_bytes(to_parquet({"layers.0.mlp_in": Moments.of(rows_of(33))}))
    row = pq.read_table(path).to_pylist()[0]
    assert (row["hook_point"], row["count"], len(row["mean"])) == ("layers.0.mlp_in", 33, 5)


def norms_of(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.asarray(np.sqrt((rows.astype(np.float64) ** 2).sum(axis=1)))


def test_scales_and_the_median_norm_are_those_of_the_rows() -> None:
    rows = rows_of(3000)
    moments, norms = of_shard(rows), norms_of(rows)
    assert (moments.unit_scale**2 * norms**2).mean() == pytest.approx(1, rel=1e-9)
    assert (moments.sqrt_d_scale * norms).mean() == pytest.approx(5**0.5, rel=1e-9)
    assert moments.median_norm == pytest.approx(float(np.median(norms)), rel=1e-3)


@given(st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=60), st.floats(0, 1))
def test_a_quantile_is_within_its_bin(norms: list[float], q: float) -> None:
    exact = float(np.quantile(norms, q, method="inverted_cdf"))
    assert NormHistogram.of(np.array(norms)).quantile(q) == pytest.approx(exact, rel=2**-7)


def test_bins_hold_their_norms_and_lie_beside_each_other() -> None:
    norms = np.concatenate([np.zeros(3), np.geomspace(1e-38, 1e38, 5000)])
    histogram = NormHistogram.of(norms)
    counts = [
        ((low <= norms) & (norms < high)).sum() for low, high in zip(histogram.lower, histogram.upper, strict=True)
    ]
    assert histogram.counts.tolist() == counts
    assert histogram.count == len(norms)
    assert NormHistogram.of(np.array([1.0, 1.0078125, 2.0])).lower.tolist() == [1.0, 1.0078125, 2.0]
    assert np.all(histogram.upper[1:] / histogram.lower[1:] <= 1 + 2**-7)


def test_wide_bins_leave_no_gap() -> None:
    edges, counts = NormHistogram.of(np.array([1.0, 1.2, 1.3, 7.9])).coarse(4)
    assert edges.tolist() == [1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert [len(part) for part in NormHistogram.of(np.zeros(0)).coarse()] == [1, 0]


@pytest.mark.parametrize("cuts", [(0,), (700,), (1, 2, 2999), (1500, 1500)])
def test_histogram_and_largest_rows_do_not_depend_on_the_cut(cuts: tuple[int, ...]) -> None:
    rows, numbers = rows_of(3000), np.arange(3000) + 10_000_000_000
    rows[[5, 2000, 2990]] = rows[77] * 3  # equal norms: the smallest number first
    parts = zip((0, *cuts), (*cuts, 3000), strict=True)
    merged = fold_list([Moments.of(rows[a:b], numbers[a:b]) for a, b in parts])
    assert merged.outlier_rows is not None
    norms = norms_of(rows)
    order = np.lexsort((numbers, -norms))[:N_OUTLIERS]
    assert [item.row for item in merged.outlier_rows] == numbers[order].tolist()
    assert [item.norm for item in merged.outlier_rows] == pytest.approx(norms[order].tolist(), rel=1e-9)
    assert [item.row - 10_000_000_000 for item in merged.outlier_rows[:3]] == [5, 2000, 2990]
    whole = of_shard(rows, numbers=numbers)
    assert merged.norm_histogram is not None
    assert whole.norm_histogram is not None
    assert merged.norm_histogram.bins.tolist() == whole.norm_histogram.bins.tolist()
    assert merged.norm_histogram.counts.tolist() == whole.norm_histogram.counts.tolist()
    assert whole.outlier_rows == merged.outlier_rows
    halves = [Moments.of(rows[part], numbers[part]) for part in (slice(1500), slice(1500, None))]
    assert halves[1].merge(halves[0]).outlier_rows == whole.outlier_rows


def test_outlier_channels_hold_much_of_the_energy() -> None:
    rows = rows_of(2000)
    squares = (rows.astype(np.float64) ** 2).sum(axis=0)
    found = Moments.of(rows).outlier_channels(0.05)
    assert [item.channel for item in found] == [3, 2]
    for item in found:
        assert item.share == pytest.approx(squares[item.channel] / squares.sum(), rel=1e-9)
        assert item.mean == pytest.approx(rows[:, item.channel].astype(np.float64).mean(), rel=1e-9)
        assert item.std == pytest.approx(rows[:, item.channel].astype(np.float64).std(), rel=1e-6)
    assert len(Moments.of(rows).outlier_channels(0)) == 5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_are_counted_and_nothing_else(bad: float) -> None:
    rows = rows_of(3000)
    bad_rows = rows.copy()
    bad_rows[[0, 1500, 2999], [0, 4, 2]] = bad
    kept = np.delete(np.arange(3000), [0, 1500, 2999])
    moments = of_shard(bad_rows)
    assert (moments.count, moments.n_nonfinite) == (2997, 3)
    close(moments, of_shard(rows[kept]), 1e-9)
    assert moments.outlier_rows == of_shard(rows[kept], numbers=kept).outlier_rows
    nothing_else = Moments.of(bad_rows[[0]])
    assert (nothing_else.count, nothing_else.n_nonfinite) == (0, 1)
    assert nothing_else.merge(nothing_else).n_nonfinite == 2
    assert nothing_else.merge(moments).n_nonfinite == moments.merge(nothing_else).n_nonfinite == 4
    close(nothing_else.merge(moments), moments, 0)


def test_a_file_of_an_earlier_actlake_has_no_norms_and_says_so() -> None:
    data = to_parquet({"x": Moments.of(rows_of(33))})
    old = pq.read_table(io.BytesIO(data)).select(["hook_point", "count", "norm_mean", "mean", "m2"])
    sink = io.BytesIO()
    pq.write_table(old, sink)
    found = from_parquet(sink.getvalue())["x"]
    assert (found.n_nonfinite, found.norm_histogram, found.outlier_rows) == (None, None, None)
    assert found.unit_scale == Moments.of(rows_of(33)).unit_scale
    for moments in (found, found.merge(Moments.of(rows_of(3))), Moments.of(rows_of(3)).merge(found)):
        with pytest.raises(DataError, match="actlake stats DATASET --from-rows"):
            _ = moments.median_norm
    assert same_bits(found.merge(Moments.empty(5)), found)
