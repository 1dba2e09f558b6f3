"""Statistics of a hook point that merge exactly: moments per channel in float64, the norms, the largest rows.

Shards are folded by a fixed binary tree over shard numbers, never in order of arrival, so that the result reproduces.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.arrays import Mapper
from actlake.storage.errors import DataError
from actlake.storage.norms import (
    F64,
    I64,
    MAX_BINS,
    N_OUTLIERS,
    NormHistogram,
    OutlierRow,
    largest,
    merge_largest,
)
from actlake.storage.parquet_bounds import check_footer, require_whole

T = TypeVar("T")
M = TypeVar("M", bound="Moments")

#: 1,024 x 640 in float64 is 5 MiB. Part of the format: another size rounds differently.
_PIECE_ROWS = 1024

#: The columns from ``n_nonfinite`` on are absent where an earlier actlake wrote the file; they then read as nulls.
_SCHEMA = pa.schema(
    [
        ("hook_point", pa.string()),
        ("count", pa.int64()),
        ("norm_mean", pa.float64()),
        ("mean", pa.list_(pa.float64())),
        ("m2", pa.list_(pa.float64())),
        ("n_nonfinite", pa.int64()),
        ("norm_bins", pa.list_(pa.int64())),
        ("norm_counts", pa.list_(pa.int64())),
        ("outlier_rows", pa.list_(pa.int64())),
        ("outlier_norms", pa.list_(pa.float64())),
    ]
)


_LATE = _SCHEMA.names[_SCHEMA.names.index("n_nonfinite") :]

#: What a file may hold where nobody knows of what it is: as many values as are 1 GiB.
_MAX_VALUES = 2**27
_MAX_POINTS = 2**17


class OutlierChannel(NamedTuple):
    """A channel that holds much of the energy: ``share`` of the sum of all squares."""

    channel: int
    mean: float
    std: float
    share: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Statistics of ``count`` rows: ``mean`` and ``m2`` are float64 [D], ``m2`` the sum of squared deviations.

    Rows that hold a value which is not finite are counted in ``n_nonfinite`` alone. ``outlier_rows`` are the 16 of the
    largest norms, largest first. The last three are None where an earlier actlake stored the statistics.
    """

    count: int
    mean: F64
    m2: F64
    norm_mean: float
    n_nonfinite: int | None = None
    norm_histogram: NormHistogram | None = None
    outlier_rows: tuple[OutlierRow, ...] | None = None

    @classmethod
    def empty(cls, width: int) -> Self:
        """Return the statistics of no rows, the neutral element of ``merge``."""
        return cls(
            count=0,
            mean=np.zeros(width),
            m2=np.zeros(width),
            norm_mean=0.0,
            n_nonfinite=0,
            norm_histogram=NormHistogram.of(np.zeros(0)),
            outlier_rows=(),
        )

    @classmethod
    def of(cls, rows: npt.NDArray[Any], numbers: I64 | None = None) -> Self:
        """Return the statistics of ``rows`` [n, D] of any float type.

        ``numbers``, int64 [n], are the rows' numbers in the dataset; by default they count from 0.
        """
        return cls._of_pieces([cls._of_piece(rows)], numbers)

    @classmethod
    def _of_piece(cls, rows: npt.NDArray[Any]) -> tuple[Self, F64]:
        """Return the moments of the finite rows, and the norms of all, float64 [n]."""
        x = rows.astype(np.float64)
        norms = kept = np.sqrt(np.einsum("nd,nd->n", x, x))
        n_nonfinite = int((~(finite := np.isfinite(norms))).sum())
        if n_nonfinite:
            x, kept = x[finite], norms[finite]
        if not len(x):
            return replace(cls.empty(rows.shape[1]), n_nonfinite=n_nonfinite), norms
        mean = x.mean(axis=0)
        x -= mean
        m2 = np.einsum("nd,nd->d", x, x)
        return cls(count=len(x), mean=mean, m2=m2, norm_mean=float(kept.mean()), n_nonfinite=n_nonfinite), norms

    @classmethod
    def _of_pieces(cls, pieces: Sequence[tuple[Self, F64]], numbers: I64 | None) -> Self:
        # Histogram and largest rows do not depend on the tree: once for all pieces is cheaper.
        norms = np.concatenate([norms for _, norms in pieces])
        chosen = np.flatnonzero(np.isfinite(norms))
        return replace(
            fold_list([moments for moments, _ in pieces]),
            norm_histogram=NormHistogram.of(norms[chosen]),
            outlier_rows=largest(chosen if numbers is None else numbers[chosen], norms[chosen]),
        )

    def merge(self, other: Self) -> Self:
        """Return the statistics of both sets of rows (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        if not other.count and not other.n_nonfinite:
            return self
        if not self.count and not self.n_nonfinite:
            return other
        count = self.count + other.count
        share = other.count / count if count else 0.0
        delta = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * (self.count * share),
            norm_mean=self.norm_mean + (other.norm_mean - self.norm_mean) * share,
            n_nonfinite=_both(int.__add__, self.n_nonfinite, other.n_nonfinite),
            norm_histogram=_both(NormHistogram.merge, self.norm_histogram, other.norm_histogram),
            outlier_rows=_both(merge_largest, self.outlier_rows, other.outlier_rows),
        )

    @property
    def plausible(self) -> bool:
        """Whether mean, m2 and mean norm are numbers that rows can have: what is stored may be anyone's."""
        known = np.isfinite(self.mean).all() and np.all((self.m2 >= 0) & (self.m2 < np.inf))
        return bool(known) and 0 <= self.norm_mean < math.inf

    @property
    def variance(self) -> F64:
        """Population variance per channel, float64 [D]; zeros where there are no rows."""
        return self.m2 / self.count if self.count else np.zeros_like(self.m2)

    @property
    def mean_squared_norm(self) -> float:
        """Mean of the rows' squared norms."""
        return float(np.sum(self.variance) + np.sum(self.mean * self.mean))

    @property
    def unit_scale(self) -> float:
        """The scalar that makes the mean squared norm 1 (Gemma Scope); NaN where every row is zero."""
        return _ratio(1.0, self.mean_squared_norm**0.5)

    @property
    def sqrt_d_scale(self) -> float:
        """The scalar that makes the mean norm sqrt(D) (sae-lens: expected_average_only_in); NaN as above."""
        return _ratio(len(self.mean) ** 0.5, self.norm_mean)

    @property
    def median_norm(self) -> float:
        """Median of the rows' norms, within 0.8 %; NaN where there are no rows.

        Raises ``DataError`` where an earlier actlake stored the statistics, without norms.
        """
        if self.norm_histogram is None:
            raise DataError(
                "these statistics have no median norm, since an earlier actlake stored them; "
                "'actlake stats DATASET --from-rows' computes it from the rows"
            )
        return self.norm_histogram.quantile(0.5)

    def outlier_channels(self, threshold: float = 0.01) -> tuple[OutlierChannel, ...]:
        """Return the channels that hold a share ``threshold`` or more of the sum of all squares, largest first."""
        squares = self.variance + self.mean * self.mean
        shares = squares / (np.sum(squares) or 1.0)
        order = np.argsort(-shares, kind="stable")
        chosen = order[shares[order] >= threshold]
        found = zip(chosen, self.mean[chosen], np.sqrt(self.variance[chosen]), shares[chosen], strict=True)
        return tuple(OutlierChannel(int(i), float(mean), float(std), float(share)) for i, mean, std, share in found)


def of_shard(
    rows: npt.NDArray[Any], mapper: Mapper = map, numbers: I64 | None = None, kept: I64 | None = None
) -> Moments:
    """Return the statistics of a shard's ``rows`` [n, D]: of pieces of 1,024, merged by a fixed tree.

    ``mapper`` may spread the pieces over threads; ``numbers`` are those of ``Moments.of``. With ``kept``, rows in
    ascending order, they are the statistics of ``rows[kept]``, which is copied by pieces alone.
    """

    def of_piece(start: int) -> tuple[Moments, F64]:
        piece = slice(start, start + _PIECE_ROWS)
        return Moments._of_piece(rows[piece if kept is None else kept[piece]])

    pieces = list(mapper(of_piece, range(0, len(rows if kept is None else kept), _PIECE_ROWS)))
    return Moments._of_pieces(pieces, numbers) if pieces else Moments.empty(rows.shape[1])


def fold(parts: Mapping[int, Moments], width: int) -> Moments:
    """Merge per-shard moments by the fixed tree: shards ``[0, 2**k)`` halve and halve again; absent ones are empty."""
    # Empty ones change nothing, so only the others are looked at, however large their numbers.
    level = {shard: part for shard, part in sorted(parts.items()) if part.count or part.n_nonfinite}
    while len(level) > 1:
        above: dict[int, Moments] = {}
        for shard, part in level.items():
            above[shard // 2] = above[shard // 2].merge(part) if shard // 2 in above else part
        level = above
    return next(iter(level.values()), Moments.empty(width))


def fold_list(level: Sequence[M]) -> M:
    """Merge neighbours pairwise until one is left; an odd last one moves up as it is."""
    while len(level) > 1:
        level = [a.merge(b) for a, b in zip(level[::2], level[1::2], strict=False)] + list(level[len(level) & ~1 :])
    return level[0]


def to_parquet(moments: Mapping[str, Moments]) -> bytes:
    """Return a shard's statistics file: one row per hook point."""
    rows = [{"hook_point": name} | _to_row(m) for name, m in moments.items()]
    sink = io.BytesIO()
    # Doubles of this kind do not compress; without it the bytes do not depend on a compressor's version.
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def from_parquet(data: bytes, widths: Mapping[str, int] | None = None) -> dict[str, Moments]:
    """Read what ``to_parquet`` wrote, or that of an earlier actlake.

    Raises ``ValueError`` for what are no statistics, or of other hook points than these, or of other widths.
    """
    most = sum(widths.values()) + MAX_BINS * len(widths) if widths else _MAX_VALUES
    check_footer(pq.ParquetFile(pa.BufferReader(data)).metadata, n_rows=_MAX_POINTS, n_values=most)
    try:
        table = pq.read_table(pa.BufferReader(data), schema=_SCHEMA)
        require_whole(table, len(table), nullable=_LATE)
    except pa.ArrowException as error:
        raise ValueError(f"no statistics: {error}") from error
    found = {row["hook_point"]: _from_row(row) for row in table.to_pylist()}
    if len(found) < len(table):
        raise ValueError("a hook point is there twice")
    for name, moments in found.items():
        if widths is not None and widths.get(name) != len(moments.mean):
            raise ValueError(f"{name!r:.40} is there with {len(moments.mean)} channels")
    return found


def _to_row(moments: Moments) -> dict[str, Any]:
    norms, outliers = moments.norm_histogram, moments.outlier_rows
    return {
        "count": moments.count,
        "norm_mean": moments.norm_mean,
        "mean": moments.mean,
        "m2": moments.m2,
        "n_nonfinite": moments.n_nonfinite,
        "norm_bins": None if norms is None else norms.bins,
        "norm_counts": None if norms is None else norms.counts,
        "outlier_rows": None if outliers is None else [item.row for item in outliers],
        "outlier_norms": None if outliers is None else [item.norm for item in outliers],
    }


def _from_row(row: Mapping[str, Any]) -> Moments:
    norms = outliers = None
    if row["norm_bins"] is not None:
        norms = NormHistogram(bins=np.array(row["norm_bins"], np.int64), counts=np.array(row["norm_counts"], np.int64))
        if not norms.plausible:
            raise ValueError("norm_bins or norm_counts are no histogram")
    if row["outlier_rows"] is not None:
        if len(row["outlier_rows"]) != len(row["outlier_norms"]) or len(row["outlier_rows"]) > N_OUTLIERS:
            raise ValueError("outlier_rows and outlier_norms differ in length, or are too many")
        outliers = tuple(map(OutlierRow, row["outlier_rows"], row["outlier_norms"]))
        if not all(item.row >= 0 and 0 <= item.norm < math.inf for item in outliers):
            raise ValueError("outlier_rows or outlier_norms that cannot be")
    mean, m2 = (np.array(row[name], dtype=np.float64) for name in ("mean", "m2"))
    if len(mean) != len(m2) or row["count"] < 0 or (row["n_nonfinite"] or 0) < 0:
        raise ValueError("mean, m2, count or n_nonfinite that cannot be")
    return Moments(
        count=row["count"],
        mean=mean,
        m2=m2,
        norm_mean=row["norm_mean"],
        n_nonfinite=row["n_nonfinite"],
        norm_histogram=norms,
        outlier_rows=outliers,
    )


def _both(merge: Callable[[T, T], T], left: T | None, right: T | None) -> T | None:
    return None if left is None or right is None else merge(left, right)


def _ratio(above: float, below: float) -> float:
    return above / below if below else float("nan")
