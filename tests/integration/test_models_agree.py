"""The real Gemma 3 270M: splices change nothing by themselves, and two models over one corpus line up row by row."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import actlake
from actlake.ingest import splice
from actlake.ingest.loading import load_model
from actlake.ingest.models import load_tokenizer, resolve_model
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import read_job
from actlake.storage.hookpoints import STREAMS

pytestmark = pytest.mark.slow

# Shallow: the forward pass stops there.
POINT, LATER = "layers.0.resid_post", "layers.1.attn_z"


def test_the_identity_changes_no_bit_of_the_real_models_logits_at_any_stream(gemma_270m: Path) -> None:
    ref = resolve_model(str(gemma_270m))
    model = load_model(ref, head=True)
    ids = torch.tensor([load_tokenizer(ref)("The capital of France is Paris, and that of Italy").input_ids])
    clean = model.logits(ids)
    assert clean.shape == (1, ids.shape[1], 262_144)
    points = [f"layers.{layer}.{stream}" for layer in (0, 9, 17) for stream in STREAMS]
    for point in points[7:14]:
        with splice(model, {point: lambda x: x}):
            assert torch.equal(model.logits(ids), clean), point
    with splice(model, {point: lambda x: x.float() for point in points}):
        assert torch.equal(model.logits(ids), clean)
    with splice(model, {"layers.9.resid_post": lambda x: torch.cat([x[:, :-1], x[:, -1:] * 0], dim=1)}):
        spliced = model.logits(ids)
    # Attention looks back only.
    assert torch.equal(spliced[:, :-1], clean[:, :-1])
    assert not torch.equal(spliced[:, -1], clean[:, -1])


@pytest.fixture(scope="module")
def chat_model(gemma_270m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with one row of a weight of the first MLP changed: another model, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("gemma-3-270m-chat")
    for file in gemma_270m.iterdir():
        if file.suffix != ".safetensors":
            os.symlink(file, folder / file.name)
    weights = load_file(gemma_270m / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][7] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_two_models_over_one_corpus_line_up(gemma_270m: Path, chat_model: Path, tmp_path: Path) -> None:
    opened = {}
    for name, folder in (("base", gemma_270m), ("chat", chat_model)):
        (tmp_path / f"{name}.toml").write_text(
            f'dataset = "{tmp_path}/{name}"\nmodel = "{folder}"\nhook_points = ["{POINT}", "{LATER}"]\nmax_rows = 150\n'
            '[capture]\nbatch_tokens = 512\n[corpus]\nsources = ["builtin:python-docs"]\ncontext_length = 64\n'
            "holdout = 0.0\nmax_tokens = 200\n[layout]\nrows_per_shard = 128\nrows_per_chunk = 64\n"
        )
        ingest(read_job(tmp_path / f"{name}.toml"), engine="local")
        opened[name] = actlake.open(tmp_path / name)
    base, chat = opened["base"].spec, opened["chat"].spec
    assert base.row_space_id == chat.row_space_id
    assert base.dataset_id != chat.dataset_id
    assert base.model_fingerprint != chat.model_fingerprint
    assert len(list((tmp_path / "corpora").iterdir())) == 1
    both = actlake.align(**opened)
    rows = 0
    for batch in both.stream(["base:*", "chat:*"], batch_size=100, epochs=1, seed=1, drop_last=False):
        numbers = batch.row.numpy()
        for name, dataset in opened.items():
            columns = dataset.rows(numbers)
            assert (columns["token_id"] == batch.token_id.numpy()).all()
            assert (columns["position"] == batch.position.numpy()).all()
            for point in (POINT, LATER):
                assert torch.equal(batch[f"{name}:{point}"], dataset.tensor(point, numbers))
        changed = (batch[f"base:{POINT}"] != batch[f"chat:{POINT}"]).any(1)
        assert changed.float().mean() > 0.9
        rows += len(numbers)
    assert rows == 150
