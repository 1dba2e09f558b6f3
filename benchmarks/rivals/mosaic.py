"""MosaicML streaming: MDS files, its own shuffle, two DataLoader workers; a sample is a block of 1,024 rows.

With a row as a sample it is ten times slower (``mosaic_rows``).
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from rivals import U16, Settings
from rivals.common import BLOCK_ROWS, as_bfloat16, forever, mixed


def _streaming() -> Any:
    # The package imports torchvision for its vision formats alone; the build of the registry needs CUDA. Transformers
    # looks whether torchvision is there, so it goes first.
    import transformers.feature_extraction_utils  # noqa: F401

    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        stub: Any = sys.modules.setdefault(name, ModuleType(name))
        stub.VisionDataset, stub.to_tensor = object, None
    import streaming

    return streaming


def prepare(rows: U16, folder: Path, block_rows: int = BLOCK_ROWS) -> None:
    """Store the rows."""
    columns = {"x": f"ndarray:uint16:{block_rows},{rows.shape[1]}"}
    with _streaming().MDSWriter(out=str(folder / "rows"), columns=columns, size_limit=1 << 26) as writer:
        for start in range(0, len(rows) // block_rows * block_rows, block_rows):
            writer.write({"x": np.array(rows[start : start + block_rows])})


def samples(folder: Path, settings: Settings, batch_size: int) -> Iterator[Tensor]:
    """Yield batches of samples, uint16 [batch, rows of a block, d], for ever."""
    streaming = _streaming()
    streaming.base.util.clean_stale_shared_memory()
    rows = streaming.StreamingDataset(
        local=str(folder / "rows"), shuffle=True, batch_size=batch_size, shuffle_seed=settings.seed
    )
    loader = DataLoader(rows, batch_size=batch_size, num_workers=settings.n_workers, drop_last=True)
    return forever(lambda: (batch["x"] for batch in loader))


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    blocks = (as_bfloat16(batch).reshape(-1, settings.width) for batch in samples(folder, settings, 4))
    return mixed(blocks, settings.mixing_rows, settings.batch_size)
