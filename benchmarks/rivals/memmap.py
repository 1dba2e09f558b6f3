"""By hand: one raw file in the page cache, gathered row by row. A true global shuffle, and no compression."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rivals import U16, Settings
from rivals.common import as_bfloat16, forever


def prepare(rows: U16, folder: Path) -> None:
    """Store the rows."""
    rows.tofile(folder / "rows.u16")


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    rows = np.memmap(folder / "rows.u16", dtype=np.uint16, mode="r").reshape(-1, settings.width)
    rng = np.random.default_rng(settings.seed)

    def epoch() -> Iterator[Tensor]:
        order = rng.permutation(len(rows))
        for start in range(0, len(rows) - settings.batch_size + 1, settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            yield as_bfloat16(torch.from_numpy(rows[chosen].view(np.int16)))

    return forever(epoch)
