"""dictionary_learning trains on streams: autoencoder, pairs, and stacks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sparse_dataset import WIDTH, unexplained

import actlake

Run = Callable[..., dict[str, Any]]


def saved(names: dict[str, Any], folder: str, width: int) -> Any:
    """Return the autoencoder that trainSAE saved."""
    ae = names["AutoEncoderTopK"](width, 128, 4)
    ae.load_state_dict(torch.load(Path(names["folder"], folder) / "trainer_0" / "ae.pt", weights_only=True))
    return ae


def test_autoencoder(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("dictionary_learning: autoencoder")
    rows = names["stream"].normalizer.apply(ds.tensor(names["point"], slice(0, 2048)))
    ae = saved(names, "", WIDTH)
    assert unexplained(ae(rows), rows) < 0.4


def test_transcoder_and_crosscoder(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("dictionary_learning: transcoder and crosscoder")
    both = {name: ds.tensor(name, slice(0, 2048)) for name in names["pairs"].hook_points}
    rows = list(names["pairs"].normalizer.apply(both).values())
    assert unexplained(saved(names, "pairs", WIDTH)(rows[0]), rows[1]) < 0.5
    layers = {name: ds.tensor(name, slice(0, 2048)) for name in names["layers"].hook_points}
    wide = torch.cat(list(names["layers"].normalizer.apply(layers).values()), dim=1)
    assert unexplained(saved(names, "stack", 3 * WIDTH)(wide), wide) < 0.4
