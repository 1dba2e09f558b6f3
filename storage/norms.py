"""The distribution of row norms: a histogram over fixed bins, and the rows of the largest norms; both merge exactly."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

#: How many rows of the largest norms are kept.
N_OUTLIERS = 16

#: A bin is a norm's float64 bits without the lowest 45: sign, exponent and 7 bits of the mantissa. Integers alone, so
#: every machine agrees, and 128 bins an octave, each 0.4 to 0.8 % of its norms wide. Part of the format.
_SHIFT = 45

#: Bins of finite norms: 2,047 octaves.
MAX_BINS = 2047 << 7


@dataclass(frozen=True, kw_only=True, eq=False)
class NormHistogram:
    """How many rows have a norm in which bin: ``bins`` and ``counts`` int64 [n], ascending, no empty bin."""

    bins: I64
    counts: I64

    @classmethod
    def of(cls, norms: F64) -> Self:
        """Return the histogram of norms, float64 [n], none of them negative or not finite."""
        bins, counts = np.unique(norms.view(np.int64) >> _SHIFT, return_counts=True)
        return cls(bins=bins, counts=counts.astype(np.int64))

    def merge(self, other: Self) -> Self:
        """Return the histogram of both sets of rows."""
        bins, place = np.unique(np.concatenate([self.bins, other.bins]), return_inverse=True)
        counts = np.zeros(len(bins), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, other.counts]))
        return type(self)(bins=bins, counts=counts)

    @property
    def count(self) -> int:
        """Rows."""
        return int(self.counts.sum())

    @property
    def plausible(self) -> bool:
        """Whether these are bins of norms that there can be, ascending, none of them empty."""
        bins, counts = self.bins, self.counts
        inside = len(bins) == len(counts) and bool(np.all((bins >= 0) & (bins < MAX_BINS)))
        return inside and bool(np.all(np.diff(bins) > 0) and np.all((counts > 0) & (counts < 2**53)))

    @property
    def lower(self) -> F64:
        """The smallest norm of each bin, float64 [n]."""
        return _edge(self.bins)

    @property
    def upper(self) -> F64:
        """Where each bin ends and the next begins, float64 [n]."""
        return _edge(self.bins + 1)

    def quantile(self, q: float) -> float:
        """Return the norm that a share ``q`` of the rows stay below: within 0.8 %, interpolated in its bin.

        NaN where there are no rows.
        """
        if not len(self.bins):
            return float("nan")
        below = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        wanted = q * below[-1]
        place = min(int(np.searchsorted(below[1:], wanted)), len(self.bins) - 1)
        share = (wanted - below[place]) / self.counts[place]
        return float(self.lower[place] + share * (self.upper[place] - self.lower[place]))

    def coarse(self, bins_per_octave: int = 8) -> tuple[F64, I64]:
        """Return edges, float64 [n + 1], and counts, int64 [n], of wider bins without gaps, as a plot wants them.

        ``bins_per_octave`` is a power of two up to 128. An octave is cut into equal parts.
        """
        shift = (128 // bins_per_octave).bit_length() - 1
        wide = self.bins >> shift
        first = int(wide[0]) if len(wide) else 0
        counts = np.zeros(int(wide[-1]) - first + 1 if len(wide) else 0, dtype=np.int64)
        np.add.at(counts, wide - first, self.counts)
        return _edge((first + np.arange(len(counts) + 1)) << shift), counts


def _edge(bins: I64) -> F64:
    return (bins << _SHIFT).view(np.float64)


class OutlierRow(NamedTuple):
    """A row of a large norm: its number in the dataset."""

    row: int
    norm: float


def largest(rows: npt.NDArray[Any], norms: F64) -> tuple[OutlierRow, ...]:
    """Return the rows of the largest norms, largest first; of equal ones the smallest row number first."""
    if len(norms) > N_OUTLIERS:
        # Few are as large as the last that is kept; only they need an order.
        least = np.partition(norms, len(norms) - N_OUTLIERS)[len(norms) - N_OUTLIERS]
        rows, norms = rows[norms >= least], norms[norms >= least]
    order = np.lexsort((rows, -norms))[:N_OUTLIERS]
    return tuple(OutlierRow(int(rows[i]), float(norms[i])) for i in order)


def merge_largest(left: tuple[OutlierRow, ...], right: tuple[OutlierRow, ...]) -> tuple[OutlierRow, ...]:
    """Return what ``largest`` returns for both sets of rows."""
    return tuple(sorted((*left, *right), key=lambda item: (-item.norm, item.row))[:N_OUTLIERS])
