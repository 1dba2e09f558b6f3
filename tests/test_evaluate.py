"""examples/evaluate.py: scores of dictionaries that are known to be perfect, useless or in between."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_gemma
import torch
from torch import Tensor

import actlake
from actlake.examples import evaluate, topk_sae
from actlake.examples.evaluate import Coder, LossScores, heldout_sequences, score_loss, score_rows
from actlake.examples.topk_sae import TopKSAE
from actlake.ingest.loading import LoadedModel, load_model
from actlake.ingest.models import resolve_model
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job

POINT = "layers.2.resid_post"
D = tiny_gemma.D_MODEL


def coder(function: Any = torch.clone, **changes: Any) -> Coder:
    """Reconstruct rows by a function; its latents are the rows themselves."""
    given: dict[str, Any] = {"reads": POINT, "writes": POINT, "latents": torch.clone, "decode": function}
    return Coder(**(given | {"mean": torch.arange(D) / D} | changes))


# --- rows ---------------------------------------------------------------------------------------------------------


def test_variance_unexplained_is_about_the_mean_of_the_rows_in_all_and_by_channel() -> None:
    rows = torch.stack([torch.arange(6.0), 10 * torch.arange(6.0) + 100, torch.full((6,), 7.0)], dim=1)
    # Sums of squares about the means: 17.5 and 1750; errors: 6 x 1 and 6 x 4. The third channel never varies.
    found = score_rows(coder(lambda x: x + torch.tensor([1.0, 2.0, 0.0])), rows, rows)
    assert found.variance_unexplained == pytest.approx(30 / 1767.5)
    assert found.channel_variance_unexplained_max == pytest.approx(6 / 17.5)
    assert found.channel_variance_unexplained_median == pytest.approx(24 / 1750)
    assert found.channel_variance_unexplained_mean == pytest.approx((6 / 17.5 + 24 / 1750) / 2)
    assert score_rows(coder(), rows, rows).variance_unexplained == 0
    mean = score_rows(coder(lambda x: x * 0 + rows.mean(0)), rows, rows)
    assert mean.variance_unexplained == pytest.approx(1)


def test_latents_are_counted_over_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_ROWS", 2)
    latents = torch.zeros(5, 4)
    latents[0, 1], latents[3, 1], latents[4, 3], latents[4, 0] = 2, -1, 3, 1e-6
    found = score_rows(coder(lambda x: x), latents, latents)
    assert (found.l0, found.n_latents, found.dead_latents, found.n_rows) == (4 / 5, 4, 1, 5)


def test_a_saved_autoencoder_gives_the_same_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae, rows = TopKSAE(6, 16, 3), torch.randn(20, 6) * 5 + 2
    mean, std = rows.mean(0), rows.std(0)
    topk_sae.save(sae, tmp_path / "sae.safetensors", point=POINT, mean=mean, std=std)
    again = evaluate.of_topk(*topk_sae.load(tmp_path / "sae.safetensors"))
    assert (again.reads, again.writes) == (POINT, POINT)
    expected = sae((rows - mean) / std) * std + mean
    torch.testing.assert_close(again(rows), expected)
    assert (again.latents(rows) != 0).sum(1).max() <= 3
    (tmp_path / "other.safetensors").write_bytes(
        (tmp_path / "sae.safetensors").read_bytes().replace(b"topk_", b"some_")
    )
    with pytest.raises(ValueError, match="no autoencoder that"):
        topk_sae.load(tmp_path / "other.safetensors")


# --- the running model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a dataset of three of its hook points."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_gemma.save(folder / "model")
    for i in range(30):
        words = " ".join(f"w{4 + (i * 13 + j * (7 + i)) % 90}" for j in range(12 + i))
        (folder / f"{i}.txt").write_text(words)
    (folder / "job.toml").write_text(
        f'dataset = "{folder}/data"\nmodel = "{folder}/model"\n'
        'hook_points = ["layers.2.resid_post", "layers.2.mlp_in", "layers.2.mlp_out"]\n'
        f'[corpus]\nsources = ["{folder}/*.txt"]\ncontext_length = 32\nholdout = 0.3\n'
        "[layout]\nrows_per_shard = 256\nrows_per_chunk = 64\n"
    )
    ingest(read_job(folder / "job.toml"), engine="local")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(resolve_model(str(folder / "model")), head=True)


@pytest.fixture(scope="module")
def sequences(folder: Path) -> list[tuple[Tensor, Tensor]]:
    return heldout_sequences(actlake.open(folder / "data"), 5)


def test_sequences_are_whole_and_spliced_where_rows_are(folder: Path, sequences: list[tuple[Tensor, Tensor]]) -> None:
    heldout = actlake.open(folder / "data").heldout
    assert len(sequences) == 5
    for number, (ids, chosen) in enumerate(sequences):
        assert ids[0] == 2
        assert chosen.tolist() == [False] + [True] * (len(ids) - 1)
        rows = (heldout["rows/sequence"][:] == number).nonzero()[0]
        positions = heldout["rows/position"][rows]
        assert sorted(positions.tolist()) == list(range(1, len(ids)))
        assert (ids[positions].numpy() == heldout["rows/token_id"][rows]).all()


def test_the_identity_recovers_all_of_the_loss_and_zeros_none(
    model: LoadedModel, sequences: list[tuple[Tensor, Tensor]]
) -> None:
    identity = score_loss(coder(), model, sequences)
    assert identity.cross_entropy_spliced == identity.cross_entropy_clean
    assert identity.loss_recovered_zero == identity.loss_recovered_mean == 1.0
    zero = score_loss(coder(torch.zeros_like), model, sequences)
    assert zero.loss_recovered_zero == 0.0
    assert zero.cross_entropy_zero == identity.cross_entropy_zero != zero.cross_entropy_clean
    mean = score_loss(coder(lambda x: x * 0 + torch.arange(D) / D), model, sequences)
    assert mean.loss_recovered_mean == 0.0
    assert mean.cross_entropy_mean == identity.cross_entropy_mean != mean.cross_entropy_zero


def test_the_clean_loss_is_the_models_own(model: LoadedModel, sequences: list[tuple[Tensor, Tensor]]) -> None:
    found = score_loss(coder(), model, sequences)
    total = 0.0
    for ids, _ in sequences:
        logits = model.logits(ids[None])[0].double()
        total -= float(logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).sum())
    n_tokens = sum(len(ids) for ids, _ in sequences)
    assert found.n_predicted == n_tokens - 5
    assert found.n_spliced == n_tokens - 5
    assert found.cross_entropy_clean == pytest.approx(total / found.n_predicted, rel=1e-5)


def test_a_transcoder_is_put_from_one_point_into_another(
    model: LoadedModel, sequences: list[tuple[Tensor, Tensor]]
) -> None:
    seen: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        seen.append(x)
        return x * 2

    transcoder = coder(double, reads="layers.2.mlp_in", writes="layers.2.mlp_out")
    found = score_loss(transcoder, model, sequences[:1])
    assert len(seen) == 1
    assert seen[0].shape == (len(sequences[0][0]) - 1, D)
    assert seen[0].dtype == torch.float32
    assert found.cross_entropy_spliced != found.cross_entropy_clean
    useless = coder(torch.zeros_like, reads="layers.2.mlp_in", writes="layers.2.mlp_out")
    assert score_loss(useless, model, sequences[:1]).loss_recovered_zero == 0.0


def test_no_harm_is_no_share() -> None:
    losses = dict.fromkeys(("clean", "spliced", "zero", "mean"), 1.0)
    scores = {f"cross_entropy_{way}": loss for way, loss in losses.items()}
    assert math.isnan(LossScores(n_sequences=1, n_predicted=1, n_spliced=1, **scores).loss_recovered_zero)


def test_it_runs_from_the_command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = str(folder / "sae.safetensors")
    monkeypatch.setattr(topk_sae, "fit", lambda _dataset, point, on_step: TopKSAE(D, 64, 8))
    monkeypatch.setattr(sys, "argv", ["topk", f"{folder}/data", "--point", POINT, "--save", sae])
    torch.manual_seed(0)
    topk_sae.main()
    command = ["evaluate", f"{folder}/data", sae, "--model", f"{folder}/model", "--sequences", "2", "--rows", "100"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    evaluate.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["point"], found["n_rows"], found["n_latents"], found["n_sequences"]) == (POINT, 100, 64, 2)
    assert 0 < found["l0"] <= 8
    assert found["loss_recovered_zero"] < 1
    monkeypatch.setattr(sys, "argv", command)
    evaluate.main()
    shown = capsys.readouterr().out
    assert f"100 held-out rows of {POINT}" in shown
    assert (
        f"zero-ablated {found['cross_entropy_zero']:8.4f}   loss recovered {found['loss_recovered_zero']:.4f}" in shown
    )
    tiny_gemma.save(folder / "other", "Gemma3ForConditionalGeneration")
    monkeypatch.setattr(sys, "argv", [*command[:4], f"{folder}/other"])
    with pytest.raises(SystemExit, match="has other weights than the model of"):
        evaluate.main()
