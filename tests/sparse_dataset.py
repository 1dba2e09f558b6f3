"""A dataset that sparse dictionaries can learn: every row is a sum of three directions."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from formula_dataset import Made, make_spec

from actlake.storage.spec import PointSpec

LAYERS, WIDTH, N_DIRECTIONS = (8, 9, 10), 32, 64
POINTS = [f"layers.{layer}.{stream}" for layer in LAYERS for stream in ("mlp_in", "mlp_out", "resid_post")]


class Sparse(Made):
    """Rows that add 3 of 64 directions, the same 3 at every hook point; each hook point has directions of its own."""

    def values(self, name: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """What is stored for some rows of an array."""
        if name not in POINTS:
            return super().values(name, rows)
        codes = np.zeros((len(rows), N_DIRECTIONS))
        for place, factor in enumerate((7_919, 104_729, 1_299_709)):
            # Six high bits of Knuth's multiplicative hash.
            latent = ((rows * factor + place) * 2_654_435_761 % 2**32) // 2**26
            np.add.at(codes, (np.arange(len(rows)), latent), 1 + (rows + place) % 7 / 7)
        grid = np.outer(np.arange(1.0, N_DIRECTIONS + 1), np.arange(1.0, WIDTH + 1))
        directions = np.cos(grid * 2**0.5 + POINTS.index(name)) + np.sin(grid * 7**0.5)
        values: npt.NDArray[Any] = codes @ directions + 2.0
        return values.astype(self.spec.arrays()[name].numpy_dtype)


def make_sparse(url: str, n_rows: int = 16_384) -> Made:
    points = tuple(PointSpec(name=name, width=WIDTH, rows_per_chunk=256) for name in POINTS)
    spec = make_spec(hook_points=points, rows_per_shard=8192, rows_per_block=4096)
    return Sparse(url, n_rows, spec).build_all()


def unexplained(found: torch.Tensor, rows: torch.Tensor) -> float:
    """Return the squared error over that of the rows' mean."""
    error = (found - rows).square().sum() / (rows - rows.mean(0)).square().sum()
    return float(error.detach())
