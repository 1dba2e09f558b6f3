"""One array of a dataset, read by row number."""

from collections.abc import Iterable, Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from actlake.shards.objects import bits_dtype
from actlake.shards.prefetch import Workers, thread_count
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import BadInputError, RowRangeError, UncommittedShardError

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset

I64 = npt.NDArray[np.int64]

#: What selects rows: a number, a slice, ``...`` or a sequence of numbers.
RowKey = int | slice | EllipsisType | Sequence[int] | npt.NDArray[Any]


class PointView:
    """One array of a dataset, by row number: of the shape that is planned, readable where shards are committed.

    ``view[5]`` is [width]; ``view[100:200]``, ``view[[3, 70_000, 5]]`` and ``view[numpy integers]`` are [n, width] in
    the order asked for. Negative numbers count from the planned end. Each chunk is read and decoded once. Rows are
    stored permuted: neighbours are not neighbouring tokens. Void rows are zeros.
    """

    def __init__(self, dataset: "ActivationDataset", array: ArraySpec) -> None:
        self._dataset, self.array = dataset, array

    @property
    def name(self) -> str:
        return self.array.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape(self._dataset.n_rows_planned)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.numpy_dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self._dataset.n_rows_planned

    def __repr__(self) -> str:
        return f"PointView({self.name!r} of {self._dataset.url!r}: {list(self.shape)} {self.dtype})"

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        for start in range(0, len(self), self.array.rows_per_chunk):
            yield from self[start : start + self.array.rows_per_chunk]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        rows = self[:]
        return rows if dtype is None else rows.astype(dtype)

    def __getitem__(self, key: RowKey) -> npt.NDArray[Any]:
        """Return the rows of a key.

        Raises ``RowRangeError`` (an ``IndexError``) for rows outside of the dataset, ``UncommittedShardError`` for
        rows without a commit record, ``BadInputError`` for a key of another kind.
        """
        rows = row_numbers(key, len(self), self.name)
        self._require_committed(rows)
        found = self._read(rows.reshape(-1)).view(self.dtype)
        one: npt.NDArray[Any] = found.reshape(rows.shape + self.shape[1:])
        return one[()] if one.ndim == 0 else one

    def _require_committed(self, rows: I64) -> None:
        space = self._dataset.spec.row_space(len(self))
        committed = self._dataset.reader.manifest.n_rows_by_shard()
        shards, offsets = np.divmod(rows.reshape(-1), space.rows_per_shard)
        for shard in np.unique(shards).tolist():
            n_rows, last = committed.get(shard, 0), int(offsets[shards == shard].max())
            if last >= n_rows:
                has = f"has {n_rows} of its {len(space.rows_of(shard))} rows" if n_rows else "is not committed"
                raise UncommittedShardError(
                    f"{self.name}: row {shard * space.rows_per_shard + last} is in shard {shard}, which {has}; "
                    "'actlake ingest' with the dataset's job file builds what is missing"
                )

    def _read(self, rows: I64) -> npt.NDArray[Any]:
        out = np.empty(self.array.shape(len(rows)), dtype=bits_dtype(self.array))
        if not len(rows):
            return out
        chunks = rows // self.array.rows_per_chunk
        order = np.argsort(chunks, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1)

        def fill(places: I64) -> None:
            self._read_chunk(int(chunks[places[0]]), rows, places, out)

        if len(groups) == 1:
            fill(groups[0])
        else:
            with Workers(min(len(groups), thread_count(self._dataset.store.local))) as workers:
                _exhaust(workers.map(fill, groups))
        return out

    def _read_chunk(self, number: int, rows: I64, places: I64, out: npt.NDArray[Any]) -> None:
        # Chunks are numbered through, since they divide the shard.
        size = self.array.rows_per_chunk
        shard, chunk = divmod(number, self.array.chunks_per_shard)
        first = int(places[0])
        target = out[first : first + size]
        whole = len(places) == size == len(target)
        if whole and np.array_equal(rows[first : first + size], np.arange(number * size, (number + 1) * size)):
            self._dataset.reader.read_chunk(self.array, shard, chunk, target)
            return
        scratch = np.empty(self.array.shape(size), dtype=out.dtype)
        self._dataset.reader.read_chunk(self.array, shard, chunk, scratch)
        out[places] = scratch[rows[places] - number * size]


def row_numbers(key: RowKey, n_rows: int, name: str) -> I64:
    """Return the row numbers of a key, int64, of no dimension for a single row."""
    if isinstance(key, slice | EllipsisType):
        start, stop, step = (key if isinstance(key, slice) else slice(None)).indices(n_rows)
        return np.arange(start, stop, step, dtype=np.int64)
    given = np.asarray(key) if not isinstance(key, tuple) else np.empty((0, 0))
    if given.size == 0 and given.ndim == 1:
        return np.empty(0, dtype=np.int64)
    if given.ndim > 1 or given.dtype.kind not in "iu":
        raise BadInputError(
            f"{name}: rows are selected by a number, a slice or a list of numbers, not by {key!r}; "
            "of a mask take np.flatnonzero(mask), and select channels from the result"
        )
    numbers = given.astype(np.int64)
    outside = (numbers < -n_rows) | (numbers >= n_rows)
    if outside.any():
        raise RowRangeError(f"{name}: row {numbers[outside].flat[0]} is out of range; the rows are 0..{n_rows - 1}")
    return np.where(numbers < 0, numbers + n_rows, numbers)


def _exhaust(results: Iterable[None]) -> None:
    for _ in results:
        pass
