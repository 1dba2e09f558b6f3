"""Mixing in memory, for readers whose samples are blocks of rows."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

#: Rows of a block: one sequence of Gemma Scope's length.
BLOCK_ROWS = 1024


def as_bfloat16(bits: Tensor) -> Tensor:
    """Return the bfloat16 of 16-bit integers, without a copy."""
    return bits.view(torch.bfloat16)


def forever(epoch: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    """Yield what one epoch yields, again and again."""
    while True:
        yield from epoch()


def mixed(blocks: Iterable[Tensor], mixing_rows: int, batch_size: int) -> Iterator[Tensor]:
    """Collect blocks [n, d], permute their rows in memory, and cut them into batches."""
    held: list[Tensor] = []
    n_rows = 0
    for block in blocks:
        held.append(block)
        n_rows += len(block)
        if n_rows >= mixing_rows:
            rows = torch.cat(held)
            rows = rows[torch.randperm(n_rows)]
            n_full = n_rows // batch_size * batch_size
            yield from rows[:n_full].split(batch_size)
            held, n_rows = [rows[n_full:]], n_rows - n_full
