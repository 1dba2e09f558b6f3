"""What a trainer gets: ``TokenBatch``, the rows of one batch at every chosen hook point."""

import weakref
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actlake.shards.objects import bits_dtype
from actlake.storage.arrays import ArraySpec
from actlake.storage.errors import UnknownNameError, nearest
from actlake.storage.spec import ROW_COLUMNS


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """B rows: per hook point a tensor [B, width] in the stored dtype, and what is known of each row.

    ``row`` (int64 [B]) is the index of each row in ``ds[point]``; ``token_id`` and ``position`` are int32 [B],
    ``sequence`` int64 [B], ``role`` uint8 [B]. Every tensor is contiguous, writable, on the CPU and the batch's own.
    """

    activations: Mapping[str, torch.Tensor]
    row: torch.Tensor
    token_id: torch.Tensor
    position: torch.Tensor
    sequence: torch.Tensor
    role: torch.Tensor

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(self.activations)

    def __getitem__(self, point: str) -> torch.Tensor:
        try:
            return self.activations[point]
        except KeyError:
            raise UnknownNameError(f"no hook point {point!r} in this batch{nearest(point, self.activations)}") from None

    def __len__(self) -> int:
        return len(self.row)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.activations.items())
        return f"TokenBatch({len(self)} rows: {shapes})"


class Memory:
    """Memory of batches, used again once a trainer has dropped every tensor of it.

    Fresh memory is handed out by the kernel page by page, zeroed: up to one more CPU second per GB. Thread-safe.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, deque[npt.NDArray[np.uint8]]] = defaultdict(deque)
        self._closed = False

    def take(self, array: ArraySpec, n_rows: int) -> npt.NDArray[Any]:
        """Return rows of an array's bits, of any content."""
        nbytes = n_rows * array.nbytes_per_row
        try:
            memory = self._free[nbytes].pop()
        except IndexError:
            memory = np.empty(nbytes, dtype=np.uint8)
        return memory.view(bits_dtype(array)).reshape(array.shape(n_rows))

    def lend(self, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return what ``take`` returned as another array; the memory comes back when that one is dropped."""
        memory: npt.NDArray[np.uint8] = rows.reshape(-1).view(np.uint8)
        lent = rows.view()
        weakref.finalize(lent, self._come_back, memory).atexit = False
        return lent

    def close(self) -> None:
        """Let go of all memory, and keep none that comes back."""
        self._closed = True
        self._free.clear()

    def _come_back(self, memory: npt.NDArray[np.uint8]) -> None:
        if not self._closed:
            self._free[memory.nbytes].append(memory)


class Slot:
    """One batch while it is being filled: an array of bits for each name, and ``row``."""

    def __init__(self, arrays: Mapping[str, ArraySpec], n_rows: int, memory: Memory) -> None:
        self.memory = memory
        self.rows = {name: memory.take(array, n_rows) for name, array in arrays.items()}
        self.rows["row"] = np.empty(n_rows, dtype=np.int64)

    def to_batch(self, points: tuple[str, ...], n_rows: int) -> TokenBatch:
        """Return the first ``n_rows`` as a batch, without a copy where that is all of them."""
        full = n_rows == len(self.rows["row"])
        tensors = {
            name: to_tensor(self.memory.lend(rows) if full else rows[:n_rows].copy())
            for name, rows in self.rows.items()
        }
        columns = {name: tensors[f"rows/{name}"] for name in ROW_COLUMNS}
        activations = {point: tensors[point] for point in points}
        return TokenBatch(activations=activations, row=tensors["row"], **columns)


def to_tensor(rows: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor of the same memory; uint16 stands for the bits of bfloat16."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor
