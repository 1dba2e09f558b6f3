"""Which sequences run together, and in which shape: a pure function of the shard, so that every attempt runs the same.

On one device type and software the bits of an activation depend on the shape of its batch, not on the batch-mates.
Sequences are run longest first. ``padded`` gives each a row of its own, padded on the right to that of the batch's
longest, where causal attention makes padding harmless. ``packed`` does so with sequences of more than 512 tokens alone:
shorter ones share rows of 256 to 512 tokens, kept apart by a mask, so that hardly any padding is run. Longer rows are
not packed: with a mask attention cannot skip what lies in the future, which costs more than the padding
(docs/adr/0009-batching-modes.md).
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actlake.storage.spec import PACKED, PADDED

# Part of the format: other numbers give other batch shapes and so other bits.
PAD_MULTIPLE = 64
SHORTEST_PACKED_ROW = 256
LONGEST_PACKED_ROW = 512

#: Rows of 256 tokens cost up to 6 % more for each token than those of 64 (docs/adr/0009-batching-modes.md).
_WORTH_PACKING = 0.95


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of ``n_tokens`` tokens; each has the places (in the given list) of the sequences that follow each other."""

    rows: tuple[tuple[int, ...], ...]
    n_tokens: int

    @property
    def members(self) -> tuple[int, ...]:
        """All sequences, row by row."""
        return tuple(member for row in self.rows for member in row)

    @property
    def is_packed(self) -> bool:
        """Whether sequences share a row, so that their positions and a mask must keep them apart."""
        return any(len(row) > 1 for row in self.rows)

    @property
    def n_run(self) -> int:
        """The token positions that go through the model, padding included."""
        return len(self.rows) * self.n_tokens


def plan_batches(lengths: Sequence[int], batch_tokens: int, context_length: int, batching: str = PADDED) -> list[Batch]:
    """Cut sequences of these lengths into batches of at most ``batch_tokens`` tokens to run (at least one row).

    No row is longer than ``context_length``, which the model may not exceed. ``batching`` is that of the spec.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    n_alone = sum(length > LONGEST_PACKED_ROW for length in lengths) if batching == PACKED else len(order)
    return [
        *_padded(order[:n_alone], lengths, batch_tokens, context_length),
        *_packed(order[n_alone:], lengths, batch_tokens, context_length),
    ]


def choose_batching(lengths: Sequence[int], batch_tokens: int, context_length: int) -> str:
    """Return the faster batching for sequences of these lengths: packed where it runs 5 % fewer tokens or less."""
    padded, packed = (
        sum(batch.n_run for batch in plan_batches(lengths, batch_tokens, context_length, batching))
        for batching in (PADDED, PACKED)
    )
    return PACKED if packed < _WORTH_PACKING * padded else PADDED


def _padded(left: list[int], lengths: Sequence[int], batch_tokens: int, context_length: int) -> list[Batch]:
    batches: list[Batch] = []
    while left:
        n_tokens = _row_tokens(lengths[left[0]], context_length)
        n_rows = max(1, batch_tokens // n_tokens)
        batches.append(Batch(rows=tuple((member,) for member in left[:n_rows]), n_tokens=n_tokens))
        del left[:n_rows]
    return batches


def _packed(left: list[int], lengths: Sequence[int], batch_tokens: int, context_length: int) -> list[Batch]:
    batches: list[Batch] = []
    while left:
        n_tokens = _row_tokens(max(SHORTEST_PACKED_ROW, lengths[left[0]]), context_length)
        n_rows = max(1, batch_tokens // n_tokens)
        rows = (_fill(left, lengths, n_tokens) for _ in range(n_rows))
        batches.append(Batch(rows=tuple(row for row in rows if row), n_tokens=n_tokens))
    return batches


def _fill(left: list[int], lengths: Sequence[int], room: int) -> tuple[int, ...]:
    """Take out of ``left``, which descends in length, the longest that fits, until none does.

    Row by row this is first-fit decreasing (Johnson, Near-optimal bin packing algorithms, 1973).
    """
    row: list[int] = []
    while (first := bisect_left(left, -room, key=lambda member: -lengths[member])) < len(left):
        row.append(left.pop(first))
        room -= lengths[row[-1]]
    return tuple(row)


def _row_tokens(n_tokens: int, context_length: int) -> int:
    return min(context_length, -(-n_tokens // PAD_MULTIPLE) * PAD_MULTIPLE)
