"""MosaicML streaming with a row as a sample, as its documentation has it."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rivals import U16, Settings, mosaic
from rivals.common import as_bfloat16


def prepare(rows: U16, folder: Path) -> None:
    """Store the rows."""
    mosaic.prepare(rows, folder, block_rows=1)


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    found = mosaic.samples(folder, settings, settings.batch_size)
    return (as_bfloat16(batch).reshape(-1, settings.width) for batch in found)
