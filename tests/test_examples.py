"""The example autoencoder learns what a working one must, is judged as it says, and refuses what it cannot do."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from formula_dataset import WIDE, Made, make_spec
from torch import Tensor

from actlake.examples import topk_sae
from actlake.examples.topk_sae import TopKSAE, fit, train, variance_explained

D, N_DIRECTIONS, N_ACTIVE = 32, 64, 3


def sparse_rows(n: int, start: int) -> Tensor:
    """Return bfloat16 [n, D]: each row adds 3 of 64 fixed directions; channels differ in scale and one in mean."""
    grid = torch.outer(torch.arange(1.0, N_DIRECTIONS + 1), torch.arange(1.0, D + 1))
    directions = torch.nn.functional.normalize(torch.cos(grid * math.sqrt(2)) + torch.sin(grid * math.sqrt(7)))
    row = torch.arange(start, start + n)
    codes = torch.zeros(n, N_DIRECTIONS)
    for place, factor in enumerate((7_919, 104_729, 1_299_709)):
        # Six high bits of Knuth's multiplicative hash.
        latent = ((row * factor + place) * 2_654_435_761 % 2**32) // 2**26
        codes[torch.arange(n), latent] += 1 + (row + place) % 7 / 7
    channel = torch.arange(D)
    return (codes @ directions * (1 + channel % 5) + 10.0 * (channel == 4)).bfloat16()


TRAINING = sparse_rows(16_384, 0)
HELDOUT = sparse_rows(2_048, 1_000_000)
MEAN, STD = TRAINING.double().mean(0), TRAINING.double().std(0)
STANDARDISED = ((HELDOUT.double() - MEAN) / STD).float()


def batches() -> Iterator[Tensor]:
    while True:
        yield from TRAINING.split(256)


def explained_by_subspace(rank: int) -> float:
    """Return the variance of the held-out rows that the best linear code with ``rank`` numbers a row explains."""
    energy = torch.linalg.svdvals((STANDARDISED - STANDARDISED.mean(0)).double()).square()
    return float(energy[:rank].sum() / energy.sum())


def test_training_finds_a_sparse_dictionary() -> None:
    torch.manual_seed(0)
    curve: list[tuple[int, float]] = []
    sae = train(
        batches(),
        HELDOUT,
        MEAN,
        STD,
        n_latents=128,
        k=N_ACTIVE,
        steps=250,
        lr=1e-2,
        on_step=lambda *at: curve.append(at),
    )
    assert [step for step, _ in curve] == list(range(25, 251, 25))
    assert curve[-1][1] == pytest.approx(variance_explained(sae, STANDARDISED), abs=1e-5)
    # With 3 numbers a row: far above any fixed subspace, where only directions that were learnt can lead.
    assert explained_by_subspace(N_ACTIVE) < 0.35
    assert curve[0][1] < curve[-1][1]
    assert curve[-1][1] > 0.85


def test_the_reconstruction_is_made_of_the_k_largest_latents() -> None:
    torch.manual_seed(0)
    sae = train(batches(), HELDOUT, MEAN, STD, n_latents=96, k=N_ACTIVE, steps=5)
    sae.encoder_bias.data -= 2.0  # some rows have fewer than k positive scores
    scores = (STANDARDISED - sae.bias) @ sae.encoder.T + sae.encoder_bias
    threshold = scores.sort(dim=1, descending=True).values[:, N_ACTIVE - 1 : N_ACTIVE]
    active = torch.where(scores >= threshold, scores, 0).clamp_min(0)
    n_active = (active > 0).sum(dim=1)
    assert int(n_active.min()) < int(n_active.max()) == N_ACTIVE
    torch.testing.assert_close(sae(STANDARDISED), active @ sae.decoder + sae.bias)
    torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(96))


class Zero(TopKSAE):
    """Explains nothing: reconstructs each row as a constant."""

    def forward(self, x_BD: Tensor) -> Tensor:
        return torch.full_like(x_BD, float(self.k))


def test_variance_explained_is_measured_about_the_mean_of_the_rows() -> None:
    rows = torch.arange(12.0).reshape(6, 2)
    # Channels 0, 2, .. 10 and 1, 3, .. 11: sums of squares about the means 70 each, about 5 they are 70 and 76.
    assert variance_explained(Zero(2, 8, 5), rows) == pytest.approx(1 - 146 / 140)


def test_latents_that_were_idle_for_long_learn_from_the_error() -> None:
    def gradient_of_unused(idle: int) -> Tensor:
        torch.manual_seed(0)
        sae = TopKSAE(D, 128, N_ACTIVE)
        with torch.no_grad():
            sae.encoder_bias[:64] = 100.0  # the others' scores lie around 0: no place among the largest
        topk_sae._loss(sae, STANDARDISED[:256], torch.full((128,), idle)).backward()
        assert sae.decoder.grad is not None
        return sae.decoder.grad[64:].abs().sum()

    assert gradient_of_unused(idle=0) == 0
    assert gradient_of_unused(idle=100) > 0


def test_batches_that_end_early_are_an_error() -> None:
    with pytest.raises(ValueError, match="ended after 64 of 65 steps"):
        train(TRAINING.split(256), HELDOUT, MEAN, STD, n_latents=16, k=2, steps=65)
    train(TRAINING.split(256), HELDOUT, MEAN, STD, n_latents=16, k=2, steps=64)


@pytest.mark.parametrize("k", [0, 17])
def test_k_must_fit_the_latents(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k = {k} is not in 1\.\.16"):
        TopKSAE(D, 16, k)


def test_fit_reads_rows_statistics_and_held_out_rows_from_the_dataset(tmp_path: Path) -> None:
    shape = {"rows_per_shard": 1_024, "rows_per_block": 512}
    ds = Made(str(tmp_path / "data"), 3_000, make_spec(**shape)).build_all().open()
    held = Made(str(tmp_path / "data/heldout"), 300, make_spec(**shape, split="heldout"), offset=0.5).build_all().open()
    curve: list[tuple[int, float]] = []
    sae = fit(ds, WIDE, steps=3, on_step=lambda *at: curve.append(at))
    rows = torch.from_numpy(ds[WIDE][:].astype("float64"))
    mean, std = rows.mean(0), rows.std(0, unbiased=False)
    standardised = (held.tensor(WIDE, slice(0, 300)).double() - mean) / std
    assert [step for step, _ in curve] == [1, 2, 3]
    assert curve[-1][1] == pytest.approx(variance_explained(sae, standardised.float()), abs=1e-5)
