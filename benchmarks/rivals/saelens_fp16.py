"""SAELens' cached activations in float16: half the bytes, and infinities where Gemma 3's values pass 65,504."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rivals import U16, Settings, saelens


def prepare(rows: U16, folder: Path) -> None:
    """Store the rows."""
    saelens.prepare(rows, folder, dtype="float16")


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    return saelens.batches(folder, settings, dtype="float16")
