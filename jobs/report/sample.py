"""Rows that the report reads itself: norms of a spread sample, its tokens and roles, the profile over positions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actlake.shards.dataset import ActivationDataset
from actlake.storage.rowspace import ROLE_VOID

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

#: Uncompressed bytes that a sample may cost; where all hook points cost more, some of them are read.
_SAMPLE_NBYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class RowSample:
    """Some rows, none of them void, from chunks spread over what is committed; ``norms`` by hook point, float64 [n]."""

    columns: Mapping[str, I64]
    norms: Mapping[str, F64]

    @property
    def n_rows(self) -> int:
        return len(self.columns["token_id"])


@dataclass(frozen=True, kw_only=True)
class PositionProfile:
    """Mean norm by position over the hook point's mean: ``ratios[point][i]`` of positions ``edges[i]:edges[i + 1]``.

    None where the sample has no row.
    """

    edges: Sequence[int]
    n_rows: Sequence[int]
    ratios: Mapping[str, Sequence[float | None]]


def sample_rows(ds: ActivationDataset, n_rows: int) -> RowSample:
    """Read about ``n_rows`` rows, whole chunks at even distances, and their norms at as many hook points as fit 4 GiB.

    Rows are permuted inside shuffle blocks, so that a chunk is a random sample of its block.
    """
    rows = _spread(ds, n_rows)
    columns = {name: np.asarray(values).astype(np.int64) for name, values in ds.rows(rows).items()}
    kept = columns["role"] != ROLE_VOID
    points = affordable(ds, len(rows), _SAMPLE_NBYTES) if len(rows) else ()
    return RowSample(
        columns={name: values[kept] for name, values in columns.items()},
        norms={name: row_norms(ds, name, rows)[kept] for name in points},
    )


def row_norms(ds: ActivationDataset, point: str, rows: I64) -> F64:
    """Return the norms of rows at a hook point, float64 [n]."""
    x = np.asarray(ds[point][rows]).astype(np.float32)
    norms: F64 = np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
    return norms


def affordable(ds: ActivationDataset, n_rows: int, nbytes: int) -> tuple[str, ...]:
    """Return as many hook points, evenly spread, as ``n_rows`` of each fit ``nbytes``; at least one."""
    names = ds.hook_points
    cost = n_rows * max(ds.spec.arrays()[name].nbytes_per_row for name in names)
    n_points = min(len(names), max(1, nbytes // max(cost, 1)))
    places = np.unique(np.linspace(0, len(names) - 1, n_points).round().astype(int))
    return tuple(names[place] for place in places)


def _spread(ds: ActivationDataset, n_rows: int) -> I64:
    size = max(point.rows_per_chunk for point in ds.spec.hook_points)
    table = ds.reader.manifest.columns("first_row", "n_rows")
    first, length = (table[name].to_numpy() for name in ("first_row", "n_rows"))
    ends = np.cumsum(-(-length // size))
    n_chunks = min(int(ends[-1]) if len(ends) else 0, -(-n_rows // size))
    if not n_chunks:
        return np.empty(0, dtype=np.int64)
    chosen = np.unique(np.linspace(0, ends[-1] - 1, n_chunks).round().astype(np.int64))
    shards = np.searchsorted(ends, chosen, side="right")
    starts = first[shards] + (chosen - ends[shards] + -(-length[shards] // size)) * size
    stops = np.minimum(starts + size, first[shards] + length[shards])
    return np.concatenate([np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])[:n_rows]


def position_profile(sample: RowSample) -> PositionProfile:
    """Return the mean norm by position, in bins that grow with it: 0, 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    positions = sample.columns["position"]
    edges = _edges(int(positions.max(initial=0)))
    bins = np.searchsorted(edges, positions, side="right") - 1
    counts = np.bincount(bins, minlength=len(edges) - 1)
    ratios = {}
    for name, norms in sample.norms.items():
        sums = np.bincount(bins, weights=norms, minlength=len(edges) - 1)
        mean = float(norms.mean()) if len(norms) else 0.0
        ratios[name] = [
            round(float(total / n / mean), 4) if n and mean else None for total, n in zip(sums, counts, strict=True)
        ]
    return PositionProfile(edges=edges, n_rows=counts.tolist(), ratios=ratios)


def _edges(last: int) -> list[int]:
    edges = [0, 1, 2, 3]
    step = 4
    while edges[-1] <= last:
        edges += [step, step + step // 2]
        step *= 2
    first_beyond = next(i for i, edge in enumerate(edges) if edge > last)
    return edges[: first_beyond + 1]
