"""The layout of Activault: ``torch.save`` files of states and input ids, loaded, joined and permuted by a process.

Its files hold states [sequences, tokens, d] and input ids; its reader keeps a few of them in memory, permutes their
rows, and hands batches to the trainer from another process.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rivals import U16, Settings
from rivals.common import BLOCK_ROWS, as_bfloat16

_FILE_ROWS = 8192


def prepare(rows: U16, folder: Path) -> None:
    """Store the rows."""
    for start in range(0, len(rows), _FILE_ROWS):
        part = torch.from_numpy(rows[start : start + _FILE_ROWS].view(np.int16)).clone()
        states = as_bfloat16(part).reshape(-1, min(BLOCK_ROWS, len(part)), rows.shape[1])
        ids = torch.zeros(states.shape[:2], dtype=torch.int32)
        torch.save({"states": states, "input_ids": ids}, folder / f"{start:010d}.pt")


class _Files(IterableDataset[Tensor]):
    def __init__(self, folder: Path, settings: Settings) -> None:
        self.files, self.settings = sorted(folder.glob("*.pt")), settings

    def __iter__(self) -> Iterator[Tensor]:
        worker, settings = get_worker_info(), self.settings
        place, step = (worker.id, worker.num_workers) if worker else (0, 1)
        rng = np.random.default_rng(settings.seed)
        torch.manual_seed(settings.seed + place)
        n_files = max(1, settings.mixing_rows // _FILE_ROWS // step)
        while True:
            mine = rng.permutation(len(self.files))[place::step]
            for start in range(0, len(mine), n_files):
                group = [torch.load(self.files[number])["states"] for number in mine[start : start + n_files]]
                rows = torch.cat(group).reshape(-1, settings.width)
                rows = rows[torch.randperm(len(rows))]
                yield from rows[: len(rows) // settings.batch_size * settings.batch_size].split(settings.batch_size)


def batches(folder: Path, settings: Settings) -> Iterator[Tensor]:
    """Yield shuffled batches."""
    loader = DataLoader(_Files(folder, settings), batch_size=None, num_workers=settings.n_workers, prefetch_factor=4)
    return iter(loader)
