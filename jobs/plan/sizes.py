"""What a dataset will hold: rows, shards, objects, raw and stored bytes of every hook point."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from actlake.storage.arrays import CRC_NBYTES, ArraySpec
from actlake.storage.hookpoints import HookPoint
from actlake.storage.spec import DatasetSpec

#: What the row columns are listed under, beside the model's streams.
ROWS = "rows"

#: Objects of a shard beside its arrays: the commit record and the statistics.
_BESIDE = 2
#: A blosc frame has a header of 16 bytes.
_FRAME_NBYTES = 16


@dataclass(frozen=True, kw_only=True)
class ArraySize:
    """One stored array over all splits; ``ratio`` is uncompressed over stored."""

    name: str
    stream: str
    layer: int | None
    width: int
    n_chunks: int
    n_objects: int
    raw_nbytes: int
    nbytes: int

    @property
    def ratio(self) -> float:
        return self.raw_nbytes / self.nbytes if self.nbytes else 1.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What all splits of a dataset hold together."""

    n_rows: Mapping[str, int]
    rows_per_shard: int
    n_shards: int
    arrays: tuple[ArraySize, ...]

    @property
    def total_rows(self) -> int:
        return sum(self.n_rows.values())

    @property
    def points(self) -> tuple[ArraySize, ...]:
        """The hook points, without the row columns."""
        return tuple(array for array in self.arrays if array.stream != ROWS)

    @property
    def n_objects(self) -> int:
        """All objects: arrays of shards, commit records and statistics."""
        return sum(array.n_objects for array in self.arrays) + _BESIDE * self.n_shards

    @property
    def n_chunks(self) -> int:
        return sum(array.n_chunks for array in self.arrays)

    @property
    def raw_nbytes(self) -> int:
        return sum(array.raw_nbytes for array in self.arrays)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def largest_object(self) -> int:
        """The stored bytes of a full shard of the largest array."""
        return max(self.object_nbytes, default=0)

    @property
    def object_nbytes(self) -> tuple[int, ...]:
        """The stored bytes of a full shard of each array."""
        full = min(self.rows_per_shard, max(self.n_rows.values(), default=0))
        return tuple(round(array.nbytes * full / max(1, self.total_rows)) for array in self.arrays)

    def by_stream(self) -> dict[str, tuple[int, int, int]]:
        """Return hook points, raw and stored bytes of each stream, the row columns last."""
        found: dict[str, tuple[int, int, int]] = {}
        for array in self.arrays:
            n, raw, nbytes = found.get(array.stream, (0, 0, 0))
            found[array.stream] = (n + 1, raw + array.raw_nbytes, nbytes + array.nbytes)
        return found


def sizes_of(spec: DatasetSpec, n_rows: Mapping[str, int], ratio: Callable[[str], float]) -> Sizes:
    """Return the sizes of a dataset of these rows by split; ``ratio`` gives an array's by its name."""
    spaces = [spec.row_space(n) for n in n_rows.values() if n]
    return Sizes(
        n_rows=dict(n_rows),
        rows_per_shard=spec.rows_per_shard,
        n_shards=sum(space.n_shards for space in spaces),
        arrays=tuple(_array_size(array, n_rows, ratio(array.name)) for array in spec.arrays().values()),
    )


def _array_size(array: ArraySpec, n_rows: Mapping[str, int], ratio: float) -> ArraySize:
    # Whole shards hold whole chunks, so that only the last of a split is padded.
    n_chunks = sum(-(-n // array.rows_per_chunk) for n in n_rows.values())
    n_shards = sum(-(-n // array.rows_per_shard) for n in n_rows.values())
    raw = sum(n_rows.values()) * array.nbytes_per_row
    frame = _FRAME_NBYTES if array.codec.name == "blosc" else 0
    point = None if array.name.startswith(f"{ROWS}/") else HookPoint.parse(array.name)
    return ArraySize(
        name=array.name,
        stream=ROWS if point is None else point.stream,
        layer=None if point is None else point.layer,
        width=array.width or 1,
        n_chunks=n_chunks,
        n_objects=n_shards,
        raw_nbytes=raw,
        nbytes=round(raw / ratio) + n_chunks * (CRC_NBYTES + frame) + n_shards * array.index_nbytes,
    )
