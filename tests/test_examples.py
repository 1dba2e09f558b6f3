"""The examples learn what working models must, are judged as they say, and refuse what they cannot do."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from formula_dataset import WIDE, Made, make_spec
from torch import Tensor

import actlake
from actlake.examples import (
    cross_layer_transcoder,
    crosscoder,
    matryoshka_sae,
    model_diffing,
    skip_transcoder,
    topk_sae,
    transcoder,
)
from actlake.examples.common import Dictionary, mean_squared_error, top_k, unexplained
from actlake.examples.common import train as train_steps
from actlake.examples.cross_layer_transcoder import CrossLayerTranscoder
from actlake.examples.matryoshka_sae import MatryoshkaSAE
from actlake.examples.skip_transcoder import SkipTranscoder
from actlake.examples.topk_sae import TopKSAE, fit, train, variance_explained
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job

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


# --- the other examples -------------------------------------------------------------------------------------------


Model = TypeVar("Model", bound=Dictionary)


def made(n: int, **widths: int) -> dict[str, Tensor]:
    """Return float32 [n, width] of each name, sums of sines."""
    rows, places = torch.arange(float(n))[:, None], enumerate(widths.items())
    return {name: torch.sin(rows * 0.7 + torch.arange(d) * 1.3 + place) for place, (name, d) in places}


def trained(model: Model, rows: Mapping[str, Tensor], steps: int) -> Model:
    """Train on the same rows again and again."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(rows).backward()
        optimizer.step()
    return model


def test_the_score_is_the_error_over_that_of_the_mean() -> None:
    class Half(Dictionary):
        def forward(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {name: rows[name].mean(0) + (rows[name] - rows[name].mean(0)) / 2 for name in ("a", "b")}

    rows = made(50, a=3, b=7, not_a_target=2)
    assert unexplained(Half(), rows) == pytest.approx(0.25)
    assert float(mean_squared_error({"a": rows["a"] + 2, "b": rows["b"] - 1}, rows)) == pytest.approx(2.5)


def test_top_k_keeps_the_largest_and_none_below_zero() -> None:
    scores = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-4.0, -3.0, 1.0, -2.0]])
    assert torch.equal(top_k(scores, 2), torch.tensor([[3.0, 0, 0, 5], [0, 0, 1, 0]]))


def test_training_refuses_batches_that_end_early() -> None:
    rows = made(20, a=4)
    batch: Any = SimpleNamespace(activations=rows)
    model = MatryoshkaSAE("a", 4, 16, 2)
    with pytest.raises(ValueError, match="ended after 3 of 4 steps"):
        train_steps(model, [batch] * 3, rows, steps=4)
    assert train_steps(model, [batch] * 60, rows, steps=60) == unexplained(model, rows) < 0.5


def test_each_prefix_of_a_matryoshka_reconstructs() -> None:
    torch.manual_seed(0)
    rows = made(200, a=12)
    sae = trained(MatryoshkaSAE("a", 12, 64, 6), rows, 150)
    assert sae.prefixes == [8, 16, 32, 64]
    latents = sae.latents(rows)
    errors = []
    for n, found in zip(sae.prefixes, sae.reconstructions(rows), strict=True):
        torch.testing.assert_close(found["a"], latents[:, :n] @ sae.decoder[:n] + sae.bias)
        errors.append(mean_squared_error(found, rows).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.8 * float(rows["a"].var())
    assert sae.loss(rows).item() == pytest.approx(sum(errors) / 4)


def test_a_skip_transcoder_adds_a_linear_map() -> None:
    torch.manual_seed(0)
    rows = made(100, a=6, b=9)
    model = trained(SkipTranscoder("a", "b", 6, 9, 32, 3), rows, 30)
    sparse = model.latents(rows) @ model.decoder + model.bias
    torch.testing.assert_close(model(rows)["b"] - sparse, rows["a"] @ model.skip)
    assert model.skip.abs().max().item() > 0.01
    assert set(model(rows)) == {"b"}


def test_a_layers_latents_write_to_that_layer_and_later_ones() -> None:
    torch.manual_seed(0)
    rows = made(100, a0=5, a1=5, a2=5, b0=5, b1=5, b2=5)
    model = trained(CrossLayerTranscoder(("a0", "a1", "a2"), ("b0", "b1", "b2"), 5, 16, 12), rows, 5)
    latents = model.latents(rows)
    assert int((latents > 0).sum(1).max()) <= 12 < latents.shape[1] == 48
    for layer in range(3):
        rows[f"a{layer}"].requires_grad_()
    found = model(rows)
    for target in range(3):
        grads = torch.autograd.grad(
            found[f"b{target}"].sum(),
            [rows[f"a{layer}"] for layer in range(3)],
            retain_graph=True,
            materialize_grads=True,
        )
        reached = [bool(grad.any()) for grad in grads]
        assert reached == [layer <= target for layer in range(3)]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of the real model over real text at the hook points that the examples stream."""
    folder = tmp_path_factory.mktemp("real")
    points = ["layers.*.mlp_in", "layers.*.mlp_out", *crosscoder.POINTS]
    (folder / "job.toml").write_text(
        f'dataset = "{folder}/data"\nmodel = "gemma-3-270m-gguf"\nmax_rows = 4_000\n'
        f"hook_points = {points}\n"
        '[corpus]\nsources = ["builtin:python-docs"]\ncontext_length = 256\nholdout = 0.1\n'
        "[layout]\nrows_per_shard = 4_096\nrows_per_chunk = 512\n"
    )
    ingest(read_job(folder / "job.toml"), engine="local")
    return f"{folder}/data"


SIZES: dict[str, Any] = {"steps": 60, "n_latents": 512, "k": 64, "batch_size": 256}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "limit"),
    # What was left unexplained when the limits were set: 0.56, 0.68, 0.60, 0.67, 0.75, 0.67.
    [("matryoshka", 0.65), ("transcoder", 0.75), ("skip", 0.70), ("crosscoder", 0.75), ("clt", 0.85), ("models", 0.75)],
)
def test_it_learns_real_activations(real: str, name: str, limit: float) -> None:
    ds, point = actlake.open(real), "layers.9.resid_post"
    run: dict[str, Callable[[], tuple[Dictionary, float]]] = {
        "matryoshka": lambda: matryoshka_sae.fit(ds, point=point, **SIZES),
        "transcoder": lambda: transcoder.fit(ds, layer=9, **SIZES),
        "skip": lambda: transcoder.fit(ds, kind=SkipTranscoder, layer=9, **SIZES),
        "crosscoder": lambda: crosscoder.fit(ds, **SIZES),
        "clt": lambda: cross_layer_transcoder.fit(ds, steps=40, n_latents=64, k=256, batch_size=256),
        "models": lambda: model_diffing.fit(ds, actlake.open(real), point=point, **SIZES),
    }
    model, score = run[name]()
    assert score < limit
    if isinstance(model, crosscoder.Crosscoder) and name == "models":
        # One model against itself: no latent is of one alone.
        share = model_diffing.share_of_first(model)
        assert 0.3 < float(share.min()) < float(share.max()) < 0.7


@pytest.mark.slow
def test_a_topk_autoencoder_learns_real_activations(real: str) -> None:
    curve: list[tuple[int, float]] = []
    topk_sae.fit(actlake.open(real), "layers.9.resid_post", steps=30, on_step=lambda *at: curve.append(at))
    # 0.49 was left unexplained when the limit was set; the mean alone leaves 1.
    assert 1 - curve[-1][1] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [matryoshka_sae, transcoder, skip_transcoder, cross_layer_transcoder, crosscoder, model_diffing],
    ids=lambda script: script.__name__.rpartition(".")[2],
)
def test_it_runs_from_the_command_line(
    real: str, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = [real] * (1 + (script is model_diffing))
    monkeypatch.setattr(sys, "argv", ["example", *datasets, "--steps", "2", "--n_latents", "64", "--k", "8"])
    script.main()
    assert "step    2: " in capsys.readouterr().out
