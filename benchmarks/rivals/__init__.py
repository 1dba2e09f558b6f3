"""Readers of other projects, and what people write by hand, on the activations that actlake streams.

Each module has ``prepare(rows, folder)``, which stores rows (uint16 [n, d], the bits of bfloat16) as that reader wants
them, and ``batches(folder, settings)``, which yields shuffled tensors [batch, d] for ever. Each is used as its own
documentation does, or better: where a Python object per row would make it hopeless, a sample is a whole block of rows
and the blocks are mixed in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

U16 = npt.NDArray[np.uint16]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every reader is asked for; ``mixing_rows`` is the memory for mixing of those that have one."""

    width: int
    batch_size: int = 4096
    mixing_rows: int = 65_536
    seed: int = 0
    n_workers: int = 2


class Rival(Protocol):
    """What a module of this package offers."""

    def prepare(self, rows: U16, folder: Path) -> None:
        """Store the rows."""

    def batches(self, folder: Path, settings: Settings) -> Iterator[Tensor]:
        """Yield shuffled batches [batch, d], epoch after epoch."""
