"""Labels travel: from a field of JSON lines through a job to rows that are chosen by it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import actlake
from actlake.jobs.ingestion import ingest
from actlake.jobs.jobfile import parse_job, read_job
from actlake.shards.select import where
from actlake.storage.errors import BadInputError, UnknownNameError


def test_rows_are_chosen_by_a_label_of_their_document(tmp_path: Path, write_job: Callable[..., Path]) -> None:
    prompts = [
        {"id": f"p{i}", "text": f"word{i} " * (5 + i % 7), "category": ["jailbreak", "refusal"][i % 2]}
        for i in range(40)
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    path = write_job()
    text = re.sub(r"sources = .*", f'sources = ["{tmp_path}/prompts.jsonl"]\nmetadata = ["category"]', path.read_text())
    path.write_text(text)
    ingest(read_job(path), engine="local")
    ds = actlake.open(tmp_path / "ds")
    rows = where(ds, category="jailbreak")
    mask = [
        bool(one) for shard in ds.reader.manifest.shards for one in rows.mask(shard, 0, ds.reader.record(shard).n_rows)
    ]
    # Word i has the id 4 + i.
    assert mask == [token % 2 == 0 for token in ds["rows/token_id"][:].tolist()]
    assert {True, False} == set(mask)
    path.write_text(text.replace('["category"]', '["categories"]').replace(f"{tmp_path}/ds", f"{tmp_path}/other"))
    with pytest.raises(
        UnknownNameError, match="no document has the metadata field 'categories'; did you mean 'category'"
    ):
        ingest(read_job(path), engine="local")


def test_a_reserved_name_is_refused_before_anything_runs() -> None:
    corpus = {"sources": ["a.jsonl"], "metadata": ["role"]}
    with pytest.raises(BadInputError, match=r"metadata = \['role'\]: 'role' is the name of something else"):
        parse_job({"dataset": "d", "model": "m", "hook_points": ["layers.0.resid_post"], "corpus": corpus})
