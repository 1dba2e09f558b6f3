"""Covariance of a hook point's channels from a sample of its rows: a pass of its own, stored beside the statistics."""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actlake.shards.dataset import ActivationDataset
from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.errors import BadInputError, CorruptObjectError, NotFoundError, SpecMismatchError
from actlake.storage.parquet_bounds import check_footer, require_whole
from actlake.storage.rowspace import ROLE_VOID

F64 = npt.NDArray[np.float64]

SCHEMA = pa.schema([("mean", pa.float64()), ("covariance", pa.list_(pa.float64()))])


@dataclass(frozen=True, kw_only=True, eq=False)
class Covariance:
    """Of ``n_rows`` rows: ``mean``, float64 [D], and population ``covariance``, float64 [D, D].

    ``seed`` chose the rows from the dataset's first ``n_rows_of`` committed ones.
    """

    n_rows: int
    n_rows_of: int
    seed: int
    mean: F64
    covariance: F64

    @property
    def effective_rank(self) -> float:
        """Participation ratio: (sum of eigenvalues)^2 over the sum of their squares, 1 to D; NaN without variance."""
        squares = float(np.sum(self.covariance * self.covariance))
        return float(np.trace(self.covariance)) ** 2 / squares if squares else math.nan


def covariance_key(point: str) -> str:
    """Return where a hook point's covariance is stored."""
    return f"stats/covariance/{point}.parquet"


def compute_covariance(
    dataset: ActivationDataset,
    point: str,
    *,
    n_rows: int = 100_000,
    seed: int = 0,
    on_rows: Callable[[int], None] = lambda n_rows: None,
) -> Covariance:
    """Return the covariance over random whole chunks, as many as hold ``n_rows`` rows where none is short or void.

    Rows are permuted in their blocks, so that a chunk is a sample itself; in a dataset of order "sequence" it holds
    neighbours, and more rows are needed. ``on_rows`` hears of rows as they are read. Raises ``BadInputError`` where
    nothing is left.
    """
    if n_rows < 1:
        raise BadInputError(f"n_rows = {n_rows} have no covariance; use many for each channel, e.g. 100_000")
    view, counts = dataset[point], dataset.reader.manifest.n_rows_by_shard()
    per_shard, per_chunk = dataset.spec.rows_per_shard, view.array.rows_per_chunk
    n_chunks = np.array([-(-count // per_chunk) for count in counts.values()], dtype=np.int64)
    ends, shards = np.cumsum(n_chunks), list(counts)
    total = int(ends[-1]) if len(ends) else 0
    drawn = np.random.default_rng(seed).choice(total, size=min(total, -(-n_rows // per_chunk)), replace=False)

    def read(number: int) -> F64:
        place = int(np.searchsorted(ends, number, side="right"))
        start = per_chunk * (number - int(ends[place] - n_chunks[place]))
        first = shards[place] * per_shard
        rows = slice(first + start, first + min(start + per_chunk, counts[shards[place]]))
        return np.asarray(view[rows][dataset["rows/role"][rows] != ROLE_VOID].astype(np.float64))

    width, count = view.shape[1], 0
    mean, scatter = np.zeros(width), np.zeros((width, width))
    with Workers(thread_count(dataset.store.local)) as workers:
        for x in workers.map(read, drawn.tolist()):
            if len(x):
                # The pairwise update of storage.moments, for matrices.
                share, delta = len(x) / (count + len(x)), x.mean(axis=0) - mean
                x -= x.mean(axis=0)
                scatter += x.T @ x + np.outer(delta, delta) * (count * share)
                mean, count = mean + delta * share, count + len(x)
            on_rows(len(x))
    if not count:
        raise BadInputError(f"{dataset.url} has no committed row of {point} that is not void; ingest it first")
    return Covariance(n_rows=count, n_rows_of=dataset.n_rows, seed=seed, mean=mean, covariance=scatter / count)


def write_covariance(dataset: ActivationDataset, point: str, found: Covariance) -> str:
    """Store a covariance beside the dataset's statistics, replacing an earlier one; return its key."""
    width = len(found.mean)
    offsets = np.arange(width + 1, dtype=np.int32) * width
    matrix = pa.ListArray.from_arrays(offsets, found.covariance.reshape(-1))
    about = {name: getattr(found, name) for name in ("n_rows", "n_rows_of", "seed")}
    about |= {"dataset_id": dataset.spec.dataset_id, "hook_point": point}
    schema = SCHEMA.with_metadata({name: str(value) for name, value in about.items()})
    sink = io.BytesIO()
    table = pa.Table.from_arrays([pa.array(found.mean), matrix], schema=schema)
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_page_checksum=True)
    dataset.store.write(covariance_key(point), sink.getvalue())
    return covariance_key(point)


def read_covariance(dataset: ActivationDataset, point: str) -> Covariance:
    """Return the covariance that ``actlake stats --covariance`` stored for a hook point.

    Raises ``NotFoundError`` where there is none, ``CorruptObjectError`` for a damaged one, ``SpecMismatchError`` for
    that of another dataset.
    """
    key, width = covariance_key(dataset[point].name), dataset[point].array.width or 1
    remedy = f"'actlake stats {dataset.url} --covariance {point}' computes it"
    try:
        data = dataset.store.read(key, 16 * width * (width + 2) + (1 << 20))
    except NotFoundError as error:
        raise NotFoundError(f"no covariance at {dataset.url}/{key}; {remedy}") from error
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        about = {name.decode(): value.decode() for name, value in (file.schema_arrow.metadata or {}).items()}
        ours = (about["dataset_id"], about["hook_point"]) == (dataset.spec.dataset_id, point)
        if ours:
            check_footer(file.metadata, n_rows=width, n_values=width * width)
            found = _parsed(file.read(), about, width)
    except (ValueError, KeyError, OSError, pa.ArrowException) as error:
        raise CorruptObjectError(f"{dataset.url}/{key} is damaged ({error}); {remedy} again") from error
    if not ours:
        raise SpecMismatchError(
            f"{dataset.url}/{key} is of {about['hook_point']} in dataset {about['dataset_id'][:12]}...; {remedy}"
        )
    return found


def _parsed(table: pa.Table, about: Mapping[str, Any], width: int) -> Covariance:
    if not table.schema.equals(SCHEMA):
        raise ValueError(f"its columns are {table.column_names}, not {SCHEMA.names} of their types")
    require_whole(table, width)
    mean = table["mean"].to_numpy()
    matrix = table["covariance"].combine_chunks().flatten().to_numpy()
    return Covariance(
        **{name: int(about[name]) for name in ("n_rows", "n_rows_of", "seed")},
        mean=mean,
        covariance=matrix.reshape(len(mean), len(mean)),
    )
