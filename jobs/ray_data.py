"""A dataset as a Ray Data source, for Ray Train and for pipelines of one's own.

``ActivationStream`` is the faster reader, and the one that resumes exactly; this one is for code that takes a
``ray.data.Dataset``. Ray moves every row through its object store, as float32 at twice the stored bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from actlake.shards.dataset import Points
from actlake.shards.objects import bits_dtype
from actlake.shards.order import Units, epoch_order
from actlake.shards.origin import Origin
from actlake.shards.source import Source, read_column
from actlake.storage.errors import BadInputError, MissingExtraError, UncommittedShardError
from actlake.storage.rowspace import ROLE_VOID

try:
    import ray.data
    from ray.data.block import BlockAccessor, BlockMetadata
    from ray.data.datasource import Datasource, ReadTask
except ImportError as error:
    raise MissingExtraError("Ray Data is not installed; pip install 'actlake[ray]'") from error

#: Row columns beside the hook points of a block.
COLUMNS = ("row", "token_id", "position", "sequence")
_COLUMN_NBYTES = 24

DTYPES = ("float32", "uint16")


def ray_dataset(
    origin: Origin, points: Points, *, batch_rows: int = 16_384, seed: int = 0, dtype: str = "float32"
) -> "ray.data.Dataset":
    """Return the committed rows of a dataset, a view or aligned datasets as a Ray dataset, read when it is consumed.

    Columns: each hook point as a tensor [width], then ``row``, ``token_id``, ``position``, ``sequence``. Blocks are of
    about ``batch_rows`` rows from chunks all over the dataset, shuffled among themselves; which rows share a block, and
    their order in it, depend on ``seed`` alone. ``iter_batches(local_shuffle_buffer_size=...)`` mixes further; another
    epoch in another order is another dataset, with another seed. A task needs the memory of a block and of one chunk
    of each hook point, and the cluster must see the dataset's URL.

    Args:
        origin: what is read; void rows, and those that a view does not choose, are left out.
        points: hook points or patterns of them.
        batch_rows: rows of a block, at least; whole chunks are read.
        seed: decides the order.
        dtype: ``"float32"``, or ``"uint16"`` for the stored bits of bfloat16 and float16: Arrow has no bfloat16, and
            ``tensor.view(torch.bfloat16)`` reads them.

    Raises ``UnknownNameError`` or ``BadInputError`` for what cannot be read, ``UncommittedShardError`` where nothing is
    committed.
    """
    source = ActivationSource(origin, points, batch_rows=batch_rows, seed=seed, dtype=dtype)
    found: ray.data.Dataset = ray.data.read_datasource(source)
    return found


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Units that are read together, (shard, first row inside of it, rows) each, and the seed of their rows' order."""

    units: tuple[tuple[int, int, int], ...]
    seed: tuple[int, int]

    @property
    def n_rows(self) -> int:
        return sum(n_rows for _, _, n_rows in self.units)


class ActivationSource(Datasource):
    """Splits the committed rows into blocks, and these among as many tasks as Ray asks for."""

    def __init__(self, origin: Origin, points: Points, *, batch_rows: int, seed: int, dtype: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._origin, self._points = origin, _names(origin, points)
        source = origin.source(self._points)
        if batch_rows < 1:
            raise BadInputError(f"batch_rows = {batch_rows} must be > 0; 16384 is the default")
        if not 0 <= seed < 2**64:
            raise BadInputError(f"seed = {seed} must be in 0..2**64-1")
        if dtype not in DTYPES:
            raise BadInputError(f"dtype = {dtype!r} is not one of {', '.join(DTYPES)}")
        for name, array in source.arrays.items():
            if dtype == "uint16" and array.numpy_dtype.itemsize != 2:
                raise BadInputError(f"dtype = 'uint16' is for stored types of two bytes; {name} is {array.dtype}")
        width = sum(array.width or 1 for array in source.arrays.values())
        self._nbytes_per_row = width * np.dtype(dtype).itemsize + _COLUMN_NBYTES
        self._dtype, self._blocks = dtype, _blocks(origin, source, batch_rows, seed)

    def get_name(self) -> str:
        """Return the name that Ray shows for the reading stage."""
        return "Activations"

    def estimate_inmemory_data_size(self) -> int:
        """Return the bytes of all blocks in memory, where no row is void or left out by a view."""
        return sum(block.n_rows for block in self._blocks) * self._nbytes_per_row

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> "list[ReadTask]":
        """Return tasks of consecutive blocks, ``parallelism`` of them or one a block."""
        n_tasks = min(max(1, parallelism), len(self._blocks))
        edges = [task * len(self._blocks) // n_tasks for task in range(n_tasks + 1)]
        return [self._task(self._blocks[low:high]) for low, high in pairwise(edges)]

    def _task(self, blocks: "list[_Block]") -> ReadTask:
        n_rows = sum(block.n_rows for block in blocks)
        metadata = BlockMetadata(
            # Not known before voids and the columns of a filter are read.
            num_rows=None,
            size_bytes=n_rows * self._nbytes_per_row,
            input_files=None,
            exec_stats=None,
        )
        return ReadTask(partial(_read, self._origin, self._points, blocks, self._dtype), metadata)


def _names(origin: Origin, points: Points) -> tuple[str, ...]:
    given: Iterable[Any] = points.values() if isinstance(points, dict) else [points]
    patterns = [name for side in given for name in ([side] if isinstance(side, str) else side)]
    if not patterns:
        raise BadInputError("no hook point given; name at least one, e.g. 'layers.9.resid_post'")
    return tuple(dict.fromkeys(name for pattern in patterns for name in origin.select(pattern)))


def _blocks(origin: Origin, source: Source, batch_rows: int, seed: int) -> list[_Block]:
    units = Units.of(source.snapshot(), source.rows_per_unit)
    if not len(units):
        raise UncommittedShardError(
            f"{origin.url} has no committed shard yet; 'actlake ingest' with its job file builds them"
        )
    ids = (units.shard * source.spec.rows_per_shard + units.start) // source.rows_per_unit
    order = epoch_order(seed, 0, ids)
    per_block = -(-batch_rows // source.rows_per_unit)
    columns = [column[order].tolist() for column in (units.shard, units.start, units.n_rows)]
    places = list(zip(*columns, strict=True))
    starts = range(0, len(places), per_block)
    return [
        _Block(units=tuple(places[low : low + per_block]), seed=(seed, number)) for number, low in enumerate(starts)
    ]


def _read(origin: Origin, points: Sequence[str], blocks: Sequence[_Block], dtype: str) -> Iterator[pa.Table]:
    source = origin.source(points)
    for block in blocks:
        columns = _columns(source, block, dtype)
        order = np.random.default_rng(block.seed).permutation(len(columns["row"]))
        yield BlockAccessor.batch_to_arrow_block({name: values[order] for name, values in columns.items()})


def _columns(source: Source, block: _Block, dtype: str) -> dict[str, npt.NDArray[Any]]:
    kept = [_kept(source, *unit) for unit in block.units]
    n_rows = sum(int(mask.sum()) for mask in kept)
    columns = {name: np.empty((n_rows, array.width or 1), dtype) for name, array in source.arrays.items()}
    rows: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in COLUMNS}
    place = 0
    for (shard, start, n_stored), mask in zip(block.units, kept, strict=True):
        after = place + int(mask.sum())
        for name in columns:
            columns[name][place:after] = _activations(source, name, shard, start, n_stored, dtype)[mask]
        first = shard * source.spec.rows_per_shard + start
        rows["row"].append(np.arange(first, first + n_stored)[mask])
        for name in COLUMNS[1:]:
            rows[name].append(read_column(source.columns, name, shard, start, start + n_stored)[mask])
        place = after
    return columns | {name: np.concatenate(parts) for name, parts in rows.items()}


def _activations(source: Source, name: str, shard: int, start: int, n_rows: int, dtype: str) -> npt.NDArray[Any]:
    reader, array = source.points[name]
    step = array.rows_per_chunk
    found = np.empty(array.shape(-(-n_rows // step) * step), dtype=bits_dtype(array))
    reader.read_rows(array, shard, start, start + n_rows, found)
    return found[:n_rows].view(np.uint16 if dtype == "uint16" else array.numpy_dtype)


def _kept(source: Source, shard: int, start: int, n_rows: int) -> npt.NDArray[np.bool_]:
    kept = np.ones(n_rows, dtype=bool)
    if source.filter is not None:
        kept &= source.filter.mask(shard, start, n_rows)
    for reader in source.readers:
        if reader.record(shard).n_void:
            kept &= read_column(reader, "role", shard, start, start + n_rows) != ROLE_VOID
    return kept
