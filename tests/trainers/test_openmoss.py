"""OpenMOSS' llamascopium trains on a stream, and reads batches of sequences."""

from collections.abc import Callable
from typing import Any

import torch
from sparse_dataset import unexplained

import actlake

Run = Callable[..., dict[str, Any]]


def test_autoencoder(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("OpenMOSS: autoencoder")
    rows = names["stream"].normalizer.apply(ds.tensor(names["point"], slice(0, 2048)))
    with torch.no_grad():
        found = names["sae"](rows)
    assert unexplained(found, rows) < 0.4
