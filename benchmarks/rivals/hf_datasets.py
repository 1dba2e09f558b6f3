"""Hugging Face datasets: Arrow files, ``shuffle`` over all rows, batches in its NumPy format (its fastest)."""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from rivals import U16, Settings
from rivals.common import as_bfloat16, forever


def prepare(rows: U16, folder: Path) -> None:
    """Store the rows."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    datasets.Dataset(pa.table({"x": column})).save_to_disk(str(folder / "rows"), max_shard_size="64MB")


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    rows = datasets.load_from_disk(str(folder / "rows")).with_format("numpy", dtype=np.uint16)
    shuffled = rows.shuffle(seed=settings.seed)

    def epoch() -> Iterator[Tensor]:
        for batch in shuffled.iter(batch_size=settings.batch_size, drop_last_batch=True):
            yield as_bfloat16(torch.from_numpy(np.ascontiguousarray(batch["x"]).view(np.int16)))

    return forever(epoch)
