"""sparsify's SparseCoder trains in loops of our own: autoencoder, transcoders, cross-layer transcoder."""

from collections.abc import Callable
from typing import Any

import pytest
from sparse_dataset import unexplained

import actlake

Run = Callable[..., dict[str, Any]]


def test_autoencoder(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("sparsify: autoencoder")
    rows = names["stream"].normalizer.apply(ds.tensor(names["point"], slice(0, 2048)))
    found = names["coder"](rows)
    assert found.latent_acts.shape == (2048, 4)
    assert unexplained(found.sae_out, rows) < 0.3


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_transcoder(run: Run, ds: "actlake.ActivationDataset", skip: bool) -> None:
    names = run("sparsify: transcoder", skip=skip)
    source, target = names["source"], names["target"]
    assert (source, target) == ("layers.9.mlp_in", "layers.9.mlp_out")
    raw = {name: ds.tensor(name, slice(0, 2048)) for name in (source, target)}
    rows = names["stream"].normalizer.apply(raw)
    assert (names["coder"].W_skip is not None) is skip
    assert unexplained(names["coder"](rows[source], rows[target]).sae_out, rows[target]) < 0.5


def test_cross_layer_transcoder(run: Run) -> None:
    names = run("sparsify: cross-layer transcoder")
    assert [decoder.shape[0] for decoder in names["decoders"]] == [3, 2, 1]
    # Standardised rows: predicting the mean costs 1.
    assert names["loss"].item() < 0.5
