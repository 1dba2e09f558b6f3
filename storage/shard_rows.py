"""Which tokens of the corpus are the rows of a shard, and where in it each is stored; builds and checks share it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from actlake.storage.corpus import Corpus
from actlake.storage.corpus_spec import TokenSequence
from actlake.storage.errors import DataError
from actlake.storage.row_index import RowIndex
from actlake.storage.rowspace import ROLE_VOID, RowSpace
from actlake.storage.spec import ROW_COLUMNS, DatasetSpec

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardRows:
    """The rows of one shard, by the sequences that own one of them, in corpus order.

    Of ``sequences[i]``, the tokens at ``positions[i]`` are rows of the shard, stored at its ``places[i]``; int64 [n_i].
    """

    sequences: tuple[TokenSequence, ...]
    positions: tuple[I64, ...]
    places: tuple[I64, ...]

    @classmethod
    def of(cls, corpus: Corpus, index: RowIndex, spec: DatasetSpec, space: RowSpace, shard: int) -> "ShardRows":
        """Read a shard's sequences; raise ``DataError`` where they have not the rows that the index promises."""
        rows, place_of = space.rows_of(shard), space.places(shard)
        chosen = index.sequences_of(rows)
        sequences = corpus.sequences(spec.split, chosen.start, chosen.stop)
        positions, places = [], []
        for sequence in sequences:
            first = int(index.first_row[sequence.index])
            kept = np.flatnonzero(spec.keep.mask(sequence.tokens, sequence.roles))[
                max(0, rows.start - first) : max(0, rows.stop - first)
            ]
            start = max(first, rows.start) - rows.start
            positions.append(kept)
            places.append(place_of[start : start + len(kept)])
        if (n_found := sum(map(len, positions))) != len(rows):
            raise DataError(f"shard {shard}: the corpus gave {n_found} rows, its row index promises {len(rows)}")
        return cls(sequences=tuple(sequences), positions=tuple(positions), places=tuple(places))

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return the row columns as they are stored, by name; the rows of redacted documents are void."""
        n_rows = sum(map(len, self.places))
        found = {name: np.empty(n_rows, dtype=dtype) for name, dtype in ROW_COLUMNS.items()}
        for sequence, positions, places in zip(self.sequences, self.positions, self.places, strict=True):
            found["token_id"][places] = sequence.tokens[positions]
            found["position"][places] = positions
            found["sequence"][places] = sequence.index
            found["role"][places] = sequence.roles[positions]
        found["token_id"][self.void] = 0
        found["role"][self.void] = ROLE_VOID
        return found

    @property
    def void(self) -> I64:
        """Where in the shard the rows of redacted documents are stored, int64 [n]."""
        both = zip(self.sequences, self.places, strict=True)
        return np.concatenate([np.zeros(0, np.int64), *(places for sequence, places in both if sequence.redacted)])
