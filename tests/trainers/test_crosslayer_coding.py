"""crosslayer-coding trains on a stream's layers, and its checkpoints bring the stream back to its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sparse_dataset import LAYERS, unexplained

import actlake

Run = Callable[..., dict[str, Any]]


def test_cross_layer_transcoder(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("crosslayer-coding")
    model, store = names["model"], names["store"]
    normalizer = store.stream.normalizer
    rows = normalizer.apply({name: ds.tensor(name, slice(0, 2048)) for name in store.stream.hook_points})
    inputs = {place: rows[f"layers.{layer}.mlp_in"] for place, layer in enumerate(LAYERS)}
    with torch.no_grad():
        found = model(inputs)
    assert set(found) == {0, 1, 2}
    for place, layer in enumerate(LAYERS):
        assert unexplained(found[place], rows[f"layers.{layer}.mlp_out"]) < 0.6
    (state, *_) = sorted(Path(names["folder"]).rglob("activation_store*.pt"))
    assert torch.load(state, weights_only=True) == store.state_dict()
