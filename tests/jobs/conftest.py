"""A whole model in miniature: a real Gemma 3 of three narrow layers with random weights, and a word tokenizer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from fakes import write_documents
from runs import contents

from actlake.storage.stores import Store


@pytest.fixture
def memory() -> Iterator[str]:
    """Return the URL of a folder in memory; what is left in it goes."""
    root = f"memory://actlake-{uuid4().hex}"
    yield root
    if (place := Store(root)).exists(""):
        place.fs.rm(place.root, recursive=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory as ``save_pretrained`` leaves it."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-gemma-3"
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {f"word{i}": 4 + i for i in range(500)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make_tokenizer: Any = PreTrainedTokenizerFast
    make_tokenizer(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = Gemma3TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=24,
        sliding_window=64,
        max_position_embeddings=256,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = Gemma3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a glob of small text files."""
    return write_documents(tmp_path_factory.mktemp("texts"), n_documents=60)


@pytest.fixture
def write_job(tmp_path: Path, tiny_model: Path, documents: str) -> Callable[..., Path]:
    """Return a function that writes a job file for the tiny model; keyword arguments replace lines by their key."""

    def write(**changes: Any) -> Path:
        values = {
            "dataset": f'"{tmp_path}/ds"',
            "model": f'"{tiny_model}"',
            "hook_points": '["layers.*.resid_post", "layers.1.attn_z"]',
            "max_rows": 700,
            "holdout": 0.2,
            "rows_per_shard": 128,
        } | changes
        path = tmp_path / "job.toml"
        path.write_text(
            f"dataset = {values['dataset']}\nmodel = {values['model']}\nhook_points = {values['hook_points']}\n"
            f"max_rows = {values['max_rows']}\n[capture]\nbatch_tokens = 256\n"
            f'[corpus]\nsources = ["{documents}"]\ncontext_length = 32\nholdout = {values["holdout"]}\n'
            f"[layout]\nrows_per_shard = {values['rows_per_shard']}\nrows_per_chunk = 32\n"
            "[run]\nthreads = 1\n"
        )
        return path

    return write


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, documents: str) -> dict[str, Any]:
    """The contents of an undisturbed run of the standard job."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "job.toml").write_text(
        f'dataset = "{folder}/ds"\nmodel = "{tiny_model}"\nhook_points = ["layers.*.resid_post", "layers.1.attn_z"]\n'
        f'max_rows = 700\n[capture]\nbatch_tokens = 256\n[corpus]\nsources = ["{documents}"]\ncontext_length = 32\n'
        "holdout = 0.2\n[layout]\nrows_per_shard = 128\nrows_per_chunk = 32\n[run]\nthreads = 1\n"
    )
    from actlake.jobs.ingestion import ingest
    from actlake.jobs.jobfile import read_job

    ingest(read_job(folder / "job.toml"), engine="local")
    return contents(folder / "ds")
