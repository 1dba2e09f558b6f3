"""SAELens trains on streams, and its weights fold into weights for raw activations."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparse_dataset import unexplained

import actlake

pytestmark = pytest.mark.slow

Run = Callable[..., dict[str, Any]]


def test_one_autoencoder(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("SAELens: one autoencoder")
    sae, normalizer, point = names["sae"], names["stream"].normalizer, names["point"]
    raw = ds.tensor(point, slice(0, 2048)).float()
    rows = normalizer.apply(raw, point)
    latents, found = sae.encode(rows), sae(rows)
    assert unexplained(found, rows) < 0.3
    assert int((latents != 0).sum(1).max()) <= 4
    # The folded weights give the same latents and the raw reconstruction.
    folded = raw @ names["W_enc"] + names["b_enc"]
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(folded, sae.encode_with_hidden_pre(rows)[1] / norms, rtol=1e-3, atol=1e-3)
    decoded = latents / norms @ names["W_dec"] + names["b_dec"]
    torch.testing.assert_close(decoded, normalizer.invert(found, point), rtol=1e-3, atol=1e-2)


def test_several_at_once(run: Run, ds: "actlake.ActivationDataset") -> None:
    names = run("SAELens: several at once")
    rows = {name: ds.tensor(name, slice(0, 2048)) for name in names["saes"]}
    rows = names["stream"].normalizer.apply(rows)
    assert list(names["saes"]) == [f"layers.{layer}.resid_post" for layer in (8, 9, 10)]
    for name, sae in names["saes"].items():
        assert unexplained(sae(rows[name]), rows[name]) < 0.3
