"""Conditions on stored rows: position, role, token, document and norm. Each reads only what it needs.

That is a row column for most, the rows of a hook point for a norm, and the corpus for what it alone knows: documents,
their labels, and where a sequence ends.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from actlake.shards.objects import bits_dtype

if TYPE_CHECKING:
    from actlake.shards.dataset import ActivationDataset

Mask = npt.NDArray[np.bool_]

#: ``(low, high)``: from low on, below high; None is open.
Range = tuple[float | None, float | None]
IntRange = tuple[int | None, int | None]


class StoredRows:
    """The rows ``start:start + n_rows`` of one shard; each column is read when it is first asked for."""

    def __init__(self, dataset: "ActivationDataset", shard: int, start: int, n_rows: int) -> None:
        self.dataset, self.shard, self.start, self.n_rows = dataset, shard, start, n_rows
        self._columns: dict[str, npt.NDArray[Any]] = {}

    @property
    def has_void(self) -> bool:
        """Whether the shard has void rows."""
        return self.dataset.reader.record(self.shard).n_void > 0

    def column(self, name: str) -> npt.NDArray[Any]:
        """Return token_id, position, sequence or role of the rows, [n]."""
        if name not in self._columns:
            self._columns[name] = self._read(f"rows/{name}", self.start, self.start + self.n_rows)
        return self._columns[name]

    def from_end(self) -> npt.NDArray[np.int64]:
        """Return how many tokens of its sequence come after each row, int64 [n]."""
        after: npt.NDArray[np.int64] = (
            self.dataset.corpus.lengths(self.column("sequence")) - 1 - self.column("position")
        )
        return after

    def norms(self, point: str, wanted: Mask) -> npt.NDArray[np.float64]:
        """Return the Euclidean norms at a hook point, float64 [n]; chunks without a wanted row are not read: nan."""
        step = self.dataset.reader.arrays[point].rows_per_chunk
        norms = np.full(self.n_rows, np.nan)
        stop = self.start + self.n_rows
        for first in range(self.start // step * step, stop, step):
            low, high = max(first, self.start), min(first + step, stop)
            place = slice(low - self.start, high - self.start)
            if wanted[place].any():
                norms[place] = _norms(self._read(point, low, high))
        return norms

    def _read(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        array = self.dataset.reader.arrays[name]
        step = array.rows_per_chunk
        first = start // step * step
        rows = np.empty(array.shape(-(-(stop - first) // step) * step), dtype=bits_dtype(array))
        self.dataset.reader.read_rows(array, self.shard, first, stop, rows)
        return rows[start - first : stop - first]


class Condition(Protocol):
    """What a row must fulfil. Immutable, thread-safe, picklable; the same rows always get the same answer.

    ``cost`` orders conditions: cheap ones are asked first, and ``wanted`` are the rows that are still left.
    """

    @property
    def cost(self) -> int:
        """0 for row columns, 1 for the corpus, 2 for activations."""

    def holds(self, rows: StoredRows, wanted: Mask) -> Mask:
        """Return bool [n]: which rows fulfil it; where ``wanted`` is False the answer is free."""

    def to_json(self) -> dict[str, Any]:
        """Return the condition as JSON values."""


@dataclass(frozen=True, kw_only=True)
class PositionIn:
    """A row's position, counted from the front or from the end of its sequence, is within a range."""

    range: IntRange
    from_end: bool = False

    @property
    def cost(self) -> int:
        return 1 if self.from_end else 0

    def holds(self, rows: StoredRows, wanted: Mask) -> Mask:
        return _within(rows.from_end() if self.from_end else rows.column("position"), self.range)

    def to_json(self) -> dict[str, Any]:
        return {"position_from_end" if self.from_end else "position": list(self.range)}


@dataclass(frozen=True, kw_only=True)
class OneOf:
    """A row column has one of these values."""

    column: str
    values: tuple[int, ...]

    @property
    def cost(self) -> int:
        return 0

    def holds(self, rows: StoredRows, wanted: Mask) -> Mask:
        found: Mask = np.isin(rows.column(self.column), np.array(self.values))
        return found

    def to_json(self) -> dict[str, Any]:
        return {self.column: list(self.values)}


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A field of the row's document has one of these values; None: the document lacks it."""

    field: str
    values: tuple[str | None, ...]

    @property
    def cost(self) -> int:
        return 1

    def holds(self, rows: StoredRows, wanted: Mask) -> Mask:
        return rows.dataset.corpus.holds(self.field, self.values, rows.column("sequence"))

    def to_json(self) -> dict[str, Any]:
        return {self.field: list(self.values)}


@dataclass(frozen=True, kw_only=True)
class NormIn:
    """The norm at a hook point, in multiples of its ``median``, is within a range."""

    point: str
    range: Range
    median: float

    @property
    def cost(self) -> int:
        return 2

    def holds(self, rows: StoredRows, wanted: Mask) -> Mask:
        low, high = (None if edge is None else edge * self.median for edge in self.range)
        return _within(rows.norms(self.point, wanted), (low, high))

    def to_json(self) -> dict[str, Any]:
        return {"norm": self.point, "range": list(self.range)}


def _within(values: npt.NDArray[Any], limits: Range) -> Mask:
    low, high = limits
    inside = np.ones(len(values), dtype=np.bool_)
    if low is not None:
        inside &= values >= low
    if high is not None:
        inside &= values < high
    return inside


def _norms(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    # In float64, as the median was; a bfloat16 is the upper half of a float32.
    values = (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows
    norms: npt.NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
    return norms
