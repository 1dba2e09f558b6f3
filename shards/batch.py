"""What a trainer gets: ``TokenBatch``, the rows of one batch at every chosen hook point."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actlake.shards.columns import BatchColumns
from actlake.storage.errors import UnknownNameError, nearest


class TokenBatch:
    """B rows: per hook point a tensor [B, width], and what is known of each row.

    ``row`` (int64 [B]) is the index of each row in ``ds[point]``; ``token_id`` and ``position`` are int32 [B],
    ``sequence`` int64 [B], ``role`` uint8 [B], all on the CPU. They are read when they are first asked for; a stream of
    which one was asked for reads it ahead from then on. Every tensor is contiguous, writable and the batch's own.
    """

    def __init__(
        self,
        activations: Mapping[str, torch.Tensor],
        columns: BatchColumns,
        labels: Mapping[str, Callable[[npt.NDArray[Any]], list[str | None]]] | None = None,
    ) -> None:
        self.activations = activations
        self._columns = columns
        self._labels = labels or {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._values: dict[str, list[str | None]] = {}

    @property
    def hook_points(self) -> tuple[str, ...]:
        return tuple(self.activations)

    @property
    def row(self) -> torch.Tensor:
        """The index of each row in ``ds[point]``, int64 [B]."""
        return self._column("row")

    @property
    def token_id(self) -> torch.Tensor:
        """The token of each row, int32 [B]."""
        return self._column("token_id")

    @property
    def position(self) -> torch.Tensor:
        """The position of each row's token in its sequence, BOS included, int32 [B]."""
        return self._column("position")

    @property
    def sequence(self) -> torch.Tensor:
        """The number of each row's sequence in the corpus, int64 [B]."""
        return self._column("sequence")

    @property
    def role(self) -> torch.Tensor:
        """The role of each row's token, uint8 [B]."""
        return self._column("role")

    @property
    def columns(self) -> dict[str, list[str | None]]:
        """For each metadata field that the stream was asked for, the value of each row's document."""
        for field, look_up in self._labels.items():
            if field not in self._values:
                self._values[field] = look_up(self._columns["sequence"])
        return self._values

    def __getitem__(self, point: str) -> torch.Tensor:
        try:
            return self.activations[point]
        except KeyError:
            raise UnknownNameError(f"no hook point {point!r} in this batch{nearest(point, self.activations)}") from None

    def __len__(self) -> int:
        # len() of a tensor is ten times as slow.
        return int(next(iter(self.activations.values())).shape[0])

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.activations.items())
        return f"TokenBatch({len(self)} rows: {shapes})"

    def __getstate__(self) -> dict[str, Any]:
        # Row columns and labels go along as values: what they are read from stays here.
        return self.__dict__ | {"_values": self.columns, "_labels": {}}

    def _column(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            self._tensors[name] = torch.from_numpy(self._columns[name])
        return self._tensors[name]


def to_tensor(rows: npt.NDArray[Any]) -> torch.Tensor:
    """Return an array as a tensor of the same memory; uint16 stands for the bits of bfloat16."""
    tensor = torch.from_numpy(rows)
    return tensor.view(torch.bfloat16) if rows.dtype == np.uint16 else tensor
