"""The real Gemma 3 270M completes prompts, and is captured on what it said."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import actlake
from actlake.ingest.models import load_tokenizer, resolve_model
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import parse_job

pytestmark = pytest.mark.slow

PROMPTS = {
    "capital": "What is the capital of France?",
    "sum": "2 + 2 =",
    "poem": "\u00c9cris un po\u00e8me sur la mer et le vent du nord.",
    "long": "List the planets of the solar system, from the sun outwards, and say of each whether it has moons.",
}


def test_the_model_completes_prompts_and_is_captured_on_its_words(tmp_path: Path, gemma_270m: Path) -> None:
    lines = [json.dumps({"id": name, "text": text}) for name, text in PROMPTS.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    job = {
        "dataset": f"{tmp_path}/ds",
        "model": str(gemma_270m),
        "hook_points": ["layers.5.resid_post"],
        "capture": {"keep": "model-turns"},
        "corpus": {
            "sources": [f"{tmp_path}/prompts.jsonl"],
            "context_length": 64,
            "holdout": 0.0,
            "url": f"{tmp_path}/corpus",
            "replies": {"max_new_tokens": 8, "temperature": 0},
        },
        "layout": {"rows_per_shard": 64, "rows_per_chunk": 16},
    }
    ingest(parse_job(job), engine="local")
    (batch,) = (tmp_path / "corpus" / "replies").glob("*.parquet")
    rows = {row["id"]: row for row in pq.read_table(batch).to_pylist()}
    assert set(rows) == {f"{name}#0" for name in PROMPTS}
    tokenizer = load_tokenizer(resolve_model(str(gemma_270m)))
    ds = actlake.open(tmp_path / "ds")
    sequence, position, token = (ds[f"rows/{name}"][:] for name in ("sequence", "position", "token_id"))
    documents = np.array(ds.corpus.values("document", sequence))
    for name, row in rows.items():
        prompt, reply = row["messages"]
        assert prompt == {"role": "user", "content": PROMPTS[name.removesuffix("#0")]}
        assert reply == {"role": "model", "content": tokenizer.decode(row["tokens"])}
        assert (len(row["tokens"]) == 8) == (row["ending"] == "length")
        of_reply = np.flatnonzero(documents == name)
        said = token[of_reply[np.argsort(position[of_reply])]].tolist()
        assert tokenizer.decode(said) == reply["content"].strip()
    assert any(row["messages"][1]["content"].strip() for row in rows.values())
    assert np.isfinite(ds["layers.5.resid_post"][:].astype(np.float32)).all()
