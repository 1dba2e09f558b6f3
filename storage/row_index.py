"""The row index: for one split and keep rule, the first row of every sequence."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actlake.storage.errors import BadInputError
from actlake.storage.rowspace import KeepRule


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Prefix sums: sequence i owns the rows ``first_row[i]:first_row[i + 1]``; int64 [n_sequences + 1]."""

    first_row: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.first_row.ndim != 1 or len(self.first_row) == 0 or self.first_row[0] != 0:
            raise BadInputError(
                f"first_row has shape {self.first_row.shape}; it must be one-dimensional and start at 0"
            )
        if np.any(np.diff(self.first_row) < 0):
            raise BadInputError("first_row falls somewhere; prefix sums never do")

    @classmethod
    def from_counts(cls, counts: npt.ArrayLike) -> "RowIndex":
        """Return the index of sequences with these numbers of rows, int64 [n_sequences]."""
        return cls(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]))

    @property
    def n_sequences(self) -> int:
        """Sequences covered."""
        return len(self.first_row) - 1

    @property
    def n_rows(self) -> int:
        """Rows of all sequences together."""
        return int(self.first_row[-1])

    def sequences_of(self, rows: range) -> range:
        """Return the shortest range of sequences that owns all these rows; empty for no rows.

        Its first and last sequence own at least one of them; between, sequences without rows may lie.
        Raises ``BadInputError`` for rows that are not there.
        """
        if not rows:
            return range(0)
        if rows.step != 1 or rows.start < 0 or rows.stop > self.n_rows:
            raise BadInputError(f"rows {rows} are not in this split; its rows are 0..{self.n_rows - 1}")
        # The last sequence that starts at or before a row owns it: those without rows start at their follower's first.
        first, last = np.searchsorted(self.first_row, [rows.start, rows.stop - 1], side="right")
        return range(int(first) - 1, int(last))


def count_rows(
    tokens: npt.NDArray[np.int32], roles: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], keep: KeepRule
) -> npt.NDArray[np.int64]:
    """Return int64 [n]: how many tokens of each sequence the rule keeps.

    Sequence i is ``tokens[offsets[i]:offsets[i + 1]]`` with its ``roles``; equal to ``keep.mask(...).sum()`` of each,
    for all at once.
    """
    position = np.arange(offsets[0], offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    chosen = slice(offsets[0], offsets[-1])
    kept = keep.mask(tokens[chosen], roles[chosen], position)
    running = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept, dtype=np.int64)])
    counts: npt.NDArray[np.int64] = np.diff(running[offsets - offsets[0]])
    return counts
