import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actlake.storage.moments import Moments, fold, fold_list, from_parquet, to_parquet

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
