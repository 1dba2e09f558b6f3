"""Statistics of a hook point that merge exactly: count, mean and M2 per channel, mean norm, in float64.

Shards are folded by a fixed binary tree over shard numbers, never in order of arrival, so that the result reproduces.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actlake.storage.arrays import Mapper

#: 1,024 x 640 in float64 is 5 MiB. Part of the format: another size rounds differently.
_PIECE_ROWS = 1024

F64 = npt.NDArray[np.float64]

_SCHEMA = pa.schema(
    [
        ("hook_point", pa.string()),
        ("count", pa.int64()),
        ("norm_mean", pa.float64()),
        ("mean", pa.list_(pa.float64())),
        ("m2", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Moments of ``count`` rows: ``mean`` and ``m2`` are float64 [D], ``m2`` the sum of squared deviations."""

    count: int
    mean: F64
    m2: F64
    norm_mean: float

    @classmethod
    def empty(cls, width: int) -> Self:
        """Return the moments of no rows, the neutral element of ``merge``."""
        return cls(count=0, mean=np.zeros(width), m2=np.zeros(width), norm_mean=0.0)

    @classmethod
    def of(cls, rows: npt.NDArray[Any]) -> Self:
        """Return the moments of ``rows`` [n, D] of any float type, in float64."""
        if len(rows) == 0:
            return cls.empty(rows.shape[1])
        x = rows.astype(np.float64)
        norm_mean = float(np.sqrt(np.einsum("nd,nd->n", x, x)).mean())
        mean = x.mean(axis=0)
        x -= mean
        return cls(count=len(rows), mean=mean, m2=np.einsum("nd,nd->d", x, x), norm_mean=norm_mean)

    def merge(self, other: Self) -> Self:
        """Return the moments of both sets of rows (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        share = other.count / count
        delta = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + delta * share,
            m2=self.m2 + other.m2 + delta * delta * (self.count * share),
            norm_mean=self.norm_mean + (other.norm_mean - self.norm_mean) * share,
        )

    @property
    def variance(self) -> F64:
        """Population variance per channel, float64 [D]; zeros where there are no rows."""
        return self.m2 / self.count if self.count else np.zeros_like(self.m2)

    @property
    def mean_squared_norm(self) -> float:
        """Mean of the rows' squared norms."""
        return float(np.sum(self.variance) + np.sum(self.mean * self.mean))


def of_shard(rows: npt.NDArray[Any], mapper: Mapper = map) -> Moments:
    """Return the moments of a shard's ``rows`` [n, D]: of pieces of 1,024, merged by a fixed tree.

    ``mapper`` may spread the pieces over threads.
    """
    starts = range(0, len(rows), _PIECE_ROWS)
    pieces = list(mapper(lambda start: Moments.of(rows[start : start + _PIECE_ROWS]), starts))
    return fold_list(pieces) if pieces else Moments.empty(rows.shape[1])


def fold(parts: Mapping[int, Moments], width: int) -> Moments:
    """Merge per-shard moments by the fixed tree: shards ``[0, 2**k)`` halve and halve again; absent ones are empty."""
    if not parts:
        return Moments.empty(width)
    size = 1 << max(parts).bit_length()
    empty = Moments.empty(width)
    level = [parts.get(shard, empty) for shard in range(size)]
    return fold_list(level)


def fold_list(level: Sequence[Moments]) -> Moments:
    """Merge neighbours pairwise until one is left; an odd last one moves up as it is."""
    while len(level) > 1:
        level = [a.merge(b) for a, b in zip(level[::2], level[1::2], strict=False)] + list(level[len(level) & ~1 :])
    return level[0]


def to_parquet(moments: Mapping[str, Moments]) -> bytes:
    """Return a shard's statistics file: one row per hook point."""
    columns = {
        "hook_point": list(moments),
        "count": [m.count for m in moments.values()],
        "norm_mean": [m.norm_mean for m in moments.values()],
        "mean": [m.mean for m in moments.values()],
        "m2": [m.m2 for m in moments.values()],
    }
    sink = io.BytesIO()
    # Doubles of this kind do not compress; without it the bytes do not depend on a compressor's version.
    pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="none", use_dictionary=False)
    return sink.getvalue()


def from_parquet(data: bytes) -> dict[str, Moments]:
    """Read what ``to_parquet`` wrote."""
    rows = pq.read_table(pa.BufferReader(data), schema=_SCHEMA).to_pylist()
    return {
        row["hook_point"]: Moments(
            count=row["count"],
            mean=np.array(row["mean"], dtype=np.float64),
            m2=np.array(row["m2"], dtype=np.float64),
            norm_mean=row["norm_mean"],
        )
        for row in rows
    }
