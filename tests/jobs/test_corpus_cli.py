"""`actlake corpus build | show | head`, and jobs that share a corpus."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import actlake
from actlake.jobs.cli import corpus, ingest  # noqa: F401 - each registers its commands
from actlake.jobs.cli.app import app
from actlake.jobs.corpus import read_corpus_job
from actlake.jobs.jobfile import parse_job
from actlake.storage.corpus import Corpus
from actlake.storage.errors import JobFileError
from actlake.storage.stores import Store


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "400"})


def write_texts(folder: Path, name: str, numbers: range) -> None:
    folder.mkdir(exist_ok=True)
    rows = [
        {"id": f"d{n}", "text": " ".join(f"word{n * j % 91}" for j in range(2 + n % 40)), "kind": ["x", "y"][n % 2]}
        for n in numbers
    ]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_texts(tmp_path / "in", "a.jsonl", range(40))
    write_texts(tmp_path / "in", "b.jsonl", range(40, 60))
    return tmp_path / "in"


def write_job(path: Path, model: Path, texts: Path, more: str = "", head: str = "") -> Path:
    path.write_text(
        f'model = "{model}"\n{head}[corpus]\nsources = ["{texts}/*.jsonl"]\nmetadata = ["kind"]\n'
        f"context_length = 16\nholdout = 0.2\n{more}"
    )
    return path


def built(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_corpus_is_built_shown_and_read_by_itself(tmp_path: Path, tiny_model: Path, texts: Path) -> None:
    job = write_job(tmp_path / "job.toml", tiny_model, texts)
    summary = built(run("corpus", "build", job, "--url", tmp_path / "c", "--engine", "local", "--json"))
    opened = Corpus.open(Store(tmp_path / "c"))
    assert summary == built(run("corpus", "show", tmp_path / "c", "--json"))
    assert summary["corpus_id"] == opened.corpus_id
    train = summary["splits"]["train"]
    assert train["n_tokens"] == sum(train["tokens_by_label"]["kind"].values())
    assert summary["tokens_by_role"]["train"] == {"text": train["n_tokens"]}
    assert (len(summary["segments"]), summary["n_quarantined"], summary["complete"]) == (1, 0, True)
    text = run("corpus", "show", tmp_path / "c").output
    for expected in (opened.corpus_id[:12], f"{train['n_tokens']:,}", "kind x", f"source {texts}/*.jsonl", "role text"):
        assert expected in text, expected
    first = opened.sequences("heldout", 0, 2)
    shown = built(run("corpus", "head", tmp_path / "c", "-n", 2, "--split", "heldout", "--json"))
    assert [one["document"] for one in shown] == [s.document for s in first]
    pieces = opened.pieces()
    assert shown[0]["spans"] == [
        {"role": "text", "turn": 0, "text": "".join(pieces[token] for token in first[0].tokens.tolist())}
    ]
    text = run("corpus", "head", tmp_path / "c", "-n", 1).output
    assert f"of {opened.sequences('train', 0, 1)[0].document!r} from token" in text
    assert "<bos>word" in text
    assert run("corpus", "head", tmp_path / "c", "-n", 100_000).exit_code == 0


def test_a_split_without_sequences_is_said_to_be_empty(tmp_path: Path, tiny_model: Path, texts: Path) -> None:
    job = write_job(tmp_path / "job.toml", tiny_model, texts)
    job.write_text(job.read_text().replace("holdout = 0.2", "holdout = 0.0"))
    built(run("corpus", "build", job, "--url", tmp_path / "c", "--engine", "local", "--json"))
    assert run("corpus", "head", tmp_path / "c", "--split", "heldout").output.startswith("no sequences in the split")
    assert built(run("corpus", "head", tmp_path / "c", "--split", "heldout", "--json")) == []


def test_new_files_are_appended_by_build_and_refused_by_ingest(tmp_path: Path, tiny_model: Path, texts: Path) -> None:
    head = f'dataset = "{tmp_path}/ds"\nhook_points = ["layers.1.resid_post"]\n'
    more = f'url = "{tmp_path}/c"\n[layout]\nrows_per_shard = 64\nrows_per_chunk = 32\n[run]\nthreads = 1\n'
    job = write_job(tmp_path / "job.toml", tiny_model, texts, more, head)
    assert run("ingest", job, "--engine", "local").exit_code == 0
    before = actlake.open(tmp_path / "ds")
    write_texts(texts, "c.jsonl", range(100, 130))
    refused = run("ingest", job, "--engine", "local")
    assert refused.exit_code == 2
    assert "or append the new files with 'actlake corpus build'" in refused.output
    summary = built(run("corpus", "build", job, "--engine", "local", "--json"))
    assert len(summary["segments"]) == 2
    assert "segment" in run("corpus", "show", tmp_path / "c").output
    result = run("ingest", job, "--engine", "local")
    assert result.exit_code == 0, result.output
    grown = actlake.open(tmp_path / "ds")
    assert grown.n_rows > before.n_rows
    assert grown.spec.dataset_id == before.spec.dataset_id
    assert grown.header.chain == tuple(segment["segment_id"] for segment in summary["segments"])
    n = before.n_rows // 64 * 64
    for name in ("rows/sequence", "rows/token_id"):
        assert grown[name][:n].tolist() == before[name][:n].tolist()


def test_a_job_uses_a_finished_corpus_whose_sources_are_gone(tmp_path: Path, tiny_model: Path, texts: Path) -> None:
    head = f'dataset = "{tmp_path}/ds"\nhook_points = ["layers.1.resid_post"]\nmax_rows = 100\n'
    more = f'url = "{tmp_path}/c"\n[layout]\nrows_per_shard = 64\nrows_per_chunk = 32\n[run]\nthreads = 1\n'
    job = write_job(tmp_path / "job.toml", tiny_model, texts, more, head)
    built(run("corpus", "build", job, "--engine", "local", "--json"))
    texts.rename(tmp_path / "gone")
    result = run("ingest", job, "--engine", "local")
    assert result.exit_code == 0, result.output
    assert actlake.open(tmp_path / "ds").n_rows == 100


def test_bad_documents_are_shown(tmp_path: Path, tiny_model: Path, texts: Path) -> None:
    (texts / "bad.jsonl").write_text('{"id": "e", "text": "", "kind": "x"}\n')
    job = write_job(tmp_path / "job.toml", tiny_model, texts, 'on_bad = "quarantine"\n')
    (texts / "more.jsonl").write_text('{"id": "f", "text": "word1", "kind": "x"}\n')
    result = run("corpus", "build", job, "--url", tmp_path / "c", "--engine", "local")
    assert result.exit_code == 0, result.output
    assert "1 bad documents were set aside" in result.output
    assert "e (bad.jsonl, line 1 of" in result.output


def test_a_mixture_is_read_from_the_job_file() -> None:
    sources = ["a.jsonl", "b.jsonl"]
    table = {"dataset": "d", "model": "m", "hook_points": ["layers.0.resid_post"]}
    job = parse_job({**table, "corpus": {"sources": sources, "weights": {"a.jsonl": 0.7, "b.jsonl": 0.3}}})
    assert job.corpus.weights == {"a.jsonl": 0.7, "b.jsonl": 0.3}
    with pytest.raises(Exception, match=r"weights\['a\.jsonl'\] = x must be above 0"):
        parse_job({**table, "corpus": {"sources": sources, "weights": {"a.jsonl": "x"}}})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('model = "m"\n[corpus]\nsources = ["a.txt"]\n', "names no place: give --url, or corpus.url, or dataset"),
        ('dataset = "d"\n[corpus]\nsources = ["a.txt"]\n', "'model' is missing"),
        ('dataset = "d"\nmodel = "m"\n', r"'corpus' is missing"),
        ('dataset = "d"\nmodel = "m"\n[corpus]\nsource = ["a.txt"]\n', r"unknown key 'corpus.source'; did you mean"),
    ],
)
def test_a_job_file_without_what_a_corpus_needs(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "job.toml").write_text(text)
    with pytest.raises(JobFileError, match=match):
        read_corpus_job(tmp_path / "job.toml", None)


def test_places_and_engines_that_are_not_there(tmp_path: Path, tiny_model: Path, texts: Path) -> None:
    result = run("corpus", "show", tmp_path / "nothing")
    assert result.exit_code == 2
    assert "no corpus at" in result.output
    job = write_job(tmp_path / "job.toml", tiny_model, texts)
    result = run("corpus", "build", job, "--url", tmp_path / "c", "--engine", "spark")
    assert result.exit_code == 2
    assert "no engine 'spark'; the engines are ray, local" in result.output
