"""By hand: safetensors files of 8,192 rows, several of them loaded ahead by a thread and permuted in memory."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rivals import U16, Settings
from rivals.common import as_bfloat16, forever

_FILE_ROWS = 8192


def prepare(rows: U16, folder: Path) -> None:
    """Store the rows."""
    for start in range(0, len(rows), _FILE_ROWS):
        part = torch.from_numpy(rows[start : start + _FILE_ROWS].view(np.int16))
        save_file({"activations": as_bfloat16(part)}, folder / f"{start:010d}.safetensors")


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    files = sorted(folder.glob("*.safetensors"))
    torch.manual_seed(settings.seed)
    n_files = max(1, settings.mixing_rows // _FILE_ROWS)
    loader = ThreadPoolExecutor(1)

    def load(group: list[int]) -> Tensor:
        return torch.cat([load_file(files[number])["activations"] for number in group])

    def epoch() -> Iterator[Tensor]:
        order = torch.randperm(len(files)).tolist()
        groups = [order[start : start + n_files] for start in range(0, len(order), n_files)]
        ahead = loader.submit(load, groups[0])
        for number in range(len(groups)):
            rows = ahead.result()
            if number + 1 < len(groups):
                ahead = loader.submit(load, groups[number + 1])
            rows = rows[torch.randperm(len(rows))]
            yield from rows[: len(rows) // settings.batch_size * settings.batch_size].split(settings.batch_size)

    return forever(epoch)
